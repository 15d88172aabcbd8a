"""Length of stages by each of the three keys. A step is 8 x 32 = 256 tokens."""

from fractions import Fraction

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megagrow.config.growth_guidelines import growth_tokens, timing_warnings
from megagrow.config.load import load_run, to_yaml
from megagrow.config.schema import RunConfig, StageConfig
from megagrow.config.stage_length import (
    run_tokens,
    settled,
    stage_steps,
    stage_tokens,
    step_tokens,
    tokens_of_steps,
)
from megagrow.errors import InputError
from megagrow.model.layers.flops import non_embedding_parameters, paper_flops_per_token
from tests.config.conftest import ONE_STAGE

STEP = 8 * 32
STAGE_KEYS = StageConfig.model_fields


def test_the_flops_are_those_computed_by_hand(load_two) -> None:
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    expected = [6 * (2 * 64 * 16 + 16 + layers * layer) for layers in (2, 8)]
    assert [paper_flops_per_token(stage.model) for stage in load_two().stages] == expected


def length(run: RunConfig) -> list[int]:
    return [stage.tokens for stage in run.stages]


def refused(load, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.partition("run.yaml: ")[2]


def test_at_tokens_counts_from_the_runs_first_token_in_whole_steps(load_two) -> None:
    run = load_two("stages.0.tokens=1000", "stages.1.tokens=null", "stages.1.at_tokens=5K")
    assert stage_tokens(run.stages[0]) == 4 * STEP
    assert length(run) == [1000, 5000 - 4 * STEP]
    run = load_two(
        *("stages.0.tokens=null", "stages.0.at_tokens=3000"),
        *("stages.1.tokens=null", "stages.1.at_tokens=3073"),
    )
    assert length(run) == [3000, 1]


def test_at_flops_counts_what_the_stages_before_it_take(load_two) -> None:
    base, target = (paper_flops_per_token(stage.model) for stage in load_two().stages)
    budget = 4 * STEP * base + 3 * STEP * target
    for extra, tokens in ((0, 3 * STEP), (1, 3 * STEP + 1), (target, 3 * STEP + 1)):
        run = load_two(
            "stages.0.tokens=1000", "stages.1.tokens=null", f"stages.1.at_flops={budget + extra}"
        )
        assert length(run) == [1000, tokens]


@pytest.mark.parametrize("written", ["1e20", "1.0e20", "100000000T", 10**20])
def test_flops_as_people_write_them(load, written: object) -> None:
    run = load("tokens=null", f"at_flops={written}")
    per_token = paper_flops_per_token(run.stages[0].model)
    assert run.stages[0].at_flops == 10**20
    assert length(run) == [-(-(10**20) // per_token)]


def test_a_run_that_has_begun_ends_at_the_tokens_of_its_budget(load_two) -> None:
    """Stage 0 trained one step of 256 tokens, then steps of 640 up to 1536 instead of 1280."""
    budget = {"tokens": "1K", "at_tokens": "null"}
    keys = [f"stages.0.{key}={value}" for key, value in budget.items()]
    batch = "stages.0.batch.global_batch_size=20"
    run = load_two(*keys, batch, "stages.1.tokens=null", "stages.1.at_tokens=5K")
    assert [stage_tokens(run.stages[0]), length(run)[1]] == [1280, 5000 - 1280]
    begun = settled(run, 0, 256)
    assert [stage_tokens(begun.stages[0]), length(begun)[1]] == [1536, 5000 - 1536]
    assert settled(begun, 0, 256 + 640) == begun, "the same after each step"
    grown = settled(run, 1, 3 * 256, (1536,))
    assert [length(grown), run_tokens(grown)] == [length(begun), run_tokens(begun)]
    assert settled(run, 1, 0) == run, "the planned lengths if the trained ones are unknown"
    assert to_yaml(grown) == to_yaml(begun)
    with pytest.raises(ValueError, match=r"at_tokens = 5000 leaves no tokens .* 5100 tokens"):
        settled(run, 1, 0, (5100,))
    flops = [paper_flops_per_token(stage.model) for stage in run.stages]
    mark = 1536 * flops[0] + 10 * STEP * flops[1]
    by_flops = load_two(*keys, batch, "stages.1.tokens=null", f"stages.1.at_flops={mark}")
    assert length(settled(by_flops, 1, 0, (1536,))) == [1000, 10 * STEP]


def large(tokens: str = "100B") -> list[str]:
    """Overrides that make a growth to the paper's 1.1B of the run."""
    return [
        "stages.0.model=llama-1.1b-6l",
        "stages.1.model=llama-1.1b",
        f"stages.1.tokens={tokens}",
    ]


def test_auto_is_equation_2_for_the_model_that_comes_after(load_two) -> None:
    run = load_two(*large(), "stages.0.tokens=auto")
    size = non_embedding_parameters(run.stages[1].model)
    assert round(size / 1e6, 1) == 1233.2
    assert length(run) == [round(growth_tokens(size, 100e9)), 10**11]
    # By hand: 0.88 x 9.09104 + 163.27 / 20.8692 - 5.74 = 10.0836.
    assert run.stages[0].tokens == pytest.approx(10**10.0836, rel=1e-3)
    assert run.stages[0].tokens_auto
    assert timing_warnings(run) == []


def test_auto_warns_outside_the_fit(load_two) -> None:
    run = load_two(*large("1T"), "stages.0.tokens=auto")
    assert timing_warnings(run) == [
        f"stages.0.tokens = auto: equation 2 gives {run.stages[0].tokens:,} tokens, outside the "
        "range of its fit: C = 6ND = 7.4e+21 (fitted: up to 1.2e+21)"
    ]
    assert timing_warnings(load_two(*large("1T"), "stages.0.tokens=10B")) == []


def test_a_stages_length_replaces_the_default_one_whole(load) -> None:
    stages = "stages: [{at_tokens: 5K}, {growth: {}}]"
    assert length(load(text=f"{ONE_STAGE}{stages}")) == [5000, 10_000]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages.1.at_tokens=50K"],
            "'stages.1.tokens' and 'stages.1.at_tokens' each set the length of one stage; keep one "
            "and remove the others or set them to null",
        ),
        (
            ["stages.0.at_flops=1e12", "stages.0.at_tokens=1K"],
            "'stages.0.tokens' and 'stages.0.at_tokens' and 'stages.0.at_flops' each set the "
            "length of one stage; keep one and remove the others or set them to null",
        ),
        (["stages.1.tokens=null"], "'stages.1.tokens' is missing"),
        (
            ["stages.1.tokens=null", "stages.1.at_tokens=5K"],
            "stages.1.at_tokens = 5000 leaves no tokens for this stage: the previous stages end at "
            "5120 tokens; use a larger value",
        ),
        (
            ["stages.1.tokens=null", "stages.1.at_flops=1e6"],
            "stages.1.at_flops = 1e+06 leaves no tokens for this stage: the previous stages take "
            "1.99e+08 FLOPs (6 x parameters x tokens); use a larger value",
        ),
        (
            ["stages.1.tokens=auto"],
            "stages.1.tokens = auto needs a following stage to grow into; set a number of tokens",
        ),
        (
            ["stages.0.tokens=auto", "stages.1.tokens=null", "stages.1.at_tokens=5K"],
            "stages.0.tokens = auto is computed from stages.1.tokens; set it instead of at_tokens",
        ),
        (
            ["stages.0.tokens=auto"],
            "stages.0.tokens = auto: equation 2 gives 3.19e+15 tokens, not below "
            "stages.1.tokens = 20000; it does not hold at this size, set a number of tokens",
        ),
        (
            ["stages.0.tokens=null", "stages.0.at_flops=-1"],
            "'stages.0.at_flops' = -1: should be a whole number of 0 or more, such as 2048, 2M or "
            "1.5B",
        ),
        (
            ["stages.0.tokens=null", "stages.0.at_tokens=0"],
            "'stages.0.at_tokens' = 0: should be greater than 0",
        ),
        (["stages.0.tokens=never"], "'stages.0.tokens' = 'never': should be a whole number"),
    ],
)
def test_what_is_refused(load_two, overrides: list[str], message: str) -> None:
    assert refused(load_two, *overrides).startswith(message)


def test_one_stage_is_named_as_it_is_written(load) -> None:
    assert refused(load, "at_tokens=5K") == (
        "'tokens' and 'at_tokens' each set the length of one stage; keep one and remove the others "
        "or set them to null"
    )


def test_the_flag_of_auto_is_no_key(load) -> None:
    with pytest.raises(InputError, match="unknown key 'tokens_auto'"):
        load("tokens_auto=true", text=ONE_STAGE)


def test_a_default_that_no_stage_takes_is_refused(load) -> None:
    text = f"{ONE_STAGE}stages: [{{at_tokens: 5K}}, {{tokens: 9K, growth: {{}}}}]"
    with pytest.raises(InputError, match="has no effect, all stages set their own"):
        load("at_flops=1e12", text=text)


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        ([], [{"tokens": "5K"}, {"tokens": "20K"}]),
        (
            [*large(), "stages.0.tokens=auto"],
            [{"tokens": "auto"}, {"tokens": "100B"}],
        ),
        (
            [
                *("stages.0.tokens=null", "stages.0.at_tokens=6K"),
                *("stages.1.tokens=null", "stages.1.at_flops=1.5e12"),
            ],
            [{"at_tokens": "6K"}, {"at_flops": "1.5e12"}],
        ),
    ],
)
def test_lengths_are_shown_as_written_and_round_trip(
    load, load_two, overrides: list[str], shown: list[dict[str, str]]
) -> None:
    run = load_two(*overrides)
    text = to_yaml(run)
    keys = ("tokens", "at_tokens", "at_flops", "tokens_auto")
    stages = yaml.safe_load(text)["stages"]
    assert [{k: s[k] for k in keys if k in s} for s in stages] == shown
    assert load(text=text) == run


lengths = st.one_of(
    st.tuples(st.just("tokens"), st.integers(1, 10**4)),
    st.tuples(st.just("at_tokens"), st.integers(1, 10**5)),
    st.tuples(st.just("at_flops"), st.integers(1, 10**10)),
)


@given(written=st.lists(lengths, min_size=1, max_size=4))
def test_each_stage_ends_at_the_first_step_that_reaches_its_mark(
    tmp_path_factory, written: list[tuple[str, int]]
) -> None:
    tree = yaml.safe_load(ONE_STAGE)
    del tree["tokens"]
    stages = [{key: value, "growth": {}} for key, value in written]
    del stages[0]["growth"]
    path = tmp_path_factory.getbasetemp() / "lengths.yaml"
    path.write_text(yaml.safe_dump(tree | {"stages": stages}), encoding="utf-8")
    try:
        run = load_run(path)
    except InputError as error:
        assert "leaves no tokens for this stage" in str(error)
        return
    steps = 0
    per_token = paper_flops_per_token(run.stages[0].model)
    for stage, (key, value) in zip(run.stages, written, strict=True):
        before = steps
        steps += stage_tokens(stage) // STEP
        unit = {"tokens": STEP, "at_tokens": STEP, "at_flops": STEP * per_token}[key]
        reached = (steps - before if key == "tokens" else steps) * unit
        assert reached - unit < value <= reached


@given(
    start=st.integers(1, 6),
    increment=st.integers(1, 4),
    increments=st.integers(1, 5),
    samples=st.integers(1, 120),
    tokens=st.integers(1, 6000),
)
def test_batches_of_a_ramp_are_those_of_megatron(
    start: int, increment: int, increments: int, samples: int, tokens: int
) -> None:
    """Steps one by one, with the size at each number of consumed samples as Megatron-LM has it."""
    size, length = start + increment * increments, 32
    ramp = {"rampup_batch_size": [start, increment, samples]}
    tree = {key: item for key, item in yaml.safe_load(ONE_STAGE).items() if key in STAGE_KEYS}
    tree |= {"tokens": tokens, "batch": {"global_batch_size": size, "micro_batch_size": 1} | ramp}
    stage = StageConfig.model_validate(tree)
    begins, consumed = [], 0
    while consumed * length < tokens:
        begins.append(consumed * length)
        reached = int(consumed / Fraction(samples, increments))
        now = size if consumed > samples else min(size, start + increment * reached)
        assert step_tokens(stage, consumed * length) == now * length
        consumed += now
    assert stage_tokens(stage) == consumed * length
    for step, begin in enumerate(begins):
        assert stage_steps(stage, begin) == len(begins) - step
        assert stage_tokens(stage, begin) == consumed * length
        assert tokens_of_steps(stage, step) == begin
    assert tokens_of_steps(stage, len(begins)) == consumed * length
