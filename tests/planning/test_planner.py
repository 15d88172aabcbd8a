"""The plan of a run: the paper's own runs by hand, warnings, and the command."""

import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

import megagrow.cli.app
from megagrow.config.load import load_run
from megagrow.errors import InputError
from megagrow.planning.planner import RunPlan, plan_run
from megagrow.planning.request import PlanResult
from megagrow.planning.tables import closing_lines, growth_rows, memory_rows, print_plan
from megagrow.reshard.traffic import rank_volume
from megagrow.train.growth_event.run_growths import stage_growth, stage_layout

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE, TARGET = 439_379_968, 1_364_297_728
BASE_TOKENS, TARGET_TOKENS = 4_769 * 2**21, 46_492 * 2**21
"""10B and 97.5B in whole steps of 2,097,152."""


def paper_plan(*overrides: str, world: int = 8) -> RunPlan:
    """The plan of the paper's 1.1B run."""
    return plan_run(load_run(CONFIGS / "gstack-1.1b.yaml", overrides), world)


def test_the_papers_run_in_numbers() -> None:
    base, target = paper_plan().stages
    assert (base.parameters, target.parameters) == (BASE, TARGET)
    assert (base.tokens, target.tokens) == (BASE_TOKENS, TARGET_TOKENS)
    assert (base.steps, target.steps, base.step_tokens) == (4_769, 46_492, 2**21)
    assert target.flops == 6 * TARGET * TARGET_TOKENS
    # Per token 6 x (all but embedding and norms), and 6 x 24 x 2048 x 2049 for attention.
    norms, table = 49 * 2048, 32000 * 2048
    true = 6 * (TARGET - norms - table) + 6 * 24 * 2048 * 2049
    assert target.flops_true == true * TARGET_TOKENS
    assert (target.optimizer.lr, target.optimizer.min_lr) == (3e-4, 3e-5)


def test_the_papers_growth() -> None:
    plan = paper_plan()
    growth = plan.stages[1].growth
    assert plan.stages[0].growth is None and growth is not None
    assert growth.layers == tuple(range(6)) * 4
    assert growth.connection_rate == pytest.approx(20 / 23)
    assert growth.factor == pytest.approx(4.0, rel=1e-4)
    assert growth.state == "reset"
    assert growth.advised_tokens == pytest.approx(12.2e9, rel=0.01)
    assert growth.outside_fit is None
    # In GiB: an eighth of 12 bytes of both, 2 bytes of the target, 64 MiB.
    expected = (12 * (BASE + TARGET) / 8 + 2 * TARGET) / 2**30 + 1 / 16
    assert growth.peak_bytes / 2**30 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chunks", [1, 2])
def test_bytes_of_a_growth_of_many_ranks(chunks: int) -> None:
    """An estimate from some ranks is close to the sum over all; a stack of 12 layers to 24 sends
    nothing between pipeline ranks with twice the chunks."""
    after = f"stages.1.parallel.virtual_pipeline_model_parallel_size={chunks}"
    changes = (
        "parallel.pipeline_model_parallel_size=2",
        "parallel.tensor_model_parallel_size=2",
        "stages.0.model.num_hidden_layers=12",
        after,
        "stages.1.growth.optimizer_state=transport",
    )
    growth = paper_plan(*changes, world=32).stages[1].growth
    assert growth is not None and growth.volume is not None and not growth.volume.is_exact
    run = load_run(CONFIGS / "gstack-1.1b.yaml", changes)
    layouts = [stage_layout(run, index, 32) for index in (0, 1)]
    volumes = [
        rank_volume(rank, layouts[0], stage_growth(run, 1), layouts[1]) for rank in range(32)
    ]
    away = sum(volume.between_pipeline_ranks for volume in volumes)
    sent = pytest.approx(sum(volume.bytes_sent for volume in volumes), rel=0.1)
    assert growth.volume.between_ranks == sent
    assert growth.volume.between_pipeline_ranks == pytest.approx(away, rel=0.1)
    assert (away == 0) == (chunks == 2)


def test_the_saving_charges_the_base_in_full() -> None:
    """The paper counts the base as 2.5B tokens of the target: 100B tokens in all. It costs 3.2B."""
    saving = paper_plan().saving
    assert saving is not None
    counted = 6 * TARGET * (TARGET_TOKENS + BASE_TOKENS * 308_307_968 / 1_233_225_728)
    spent = 6 * (BASE * BASE_TOKENS + TARGET * TARGET_TOKENS)
    assert saving.scratch_flops == pytest.approx((1.41 * counted, 1.55 * counted))
    assert saving.speedup == pytest.approx((1.41 * counted / spent - 1, 1.55 * counted / spent - 1))
    assert saving.speedup == pytest.approx((0.400, 0.539), abs=5e-4)
    assert saving.saved == pytest.approx((1 - 1 / 1.400, 1 - 1 / 1.539), abs=5e-4)


def test_a_growth_to_the_same_size_has_no_saving_and_a_warning() -> None:
    plan = paper_plan("stages.0.model=llama-1.1b")
    assert plan.saving is None
    assert any("stages.1: the model is that of the previous stage" in w for w in plan.warnings)


def test_whose_figures_these_are_is_said() -> None:
    said = " ".join(closing_lines(paper_plan()))
    assert "by the paper, not measured here" in said
    assert "41% to 55% by Gstack at g = 4 (this run: g = 4.00)" in said
    assert "a speedup of 40.0% to 53.9% with the base charged in full" in said
    assert "2.637e+19 FLOPs, 3.2% of the total" in said
    assert "Warning" not in said


@pytest.mark.parametrize(
    "overrides",
    [
        ("stages.1.growth.operator=zero_depth",),
        ("stages.1.growth.layer_map=interpolate",),
    ],
)
def test_nothing_is_promised_for_what_the_paper_did_not_measure(overrides: tuple[str, ...]) -> None:
    plan = paper_plan(*overrides)
    assert plan.saving is None
    said = " ".join(closing_lines(plan))
    assert "Saving: unknown" in said
    assert "speedup of" not in said


def test_interpolation_connects_less() -> None:
    growth = paper_plan("stages.1.growth.layer_map=interpolate").stages[1].growth
    assert growth is not None
    assert growth_rows([growth])["connection rate Rc"] == [f"{5 / 23:.1%}"]


def test_a_run_from_scratch_promises_nothing() -> None:
    plan = plan_run(load_run(CONFIGS / "scratch-1.1b.yaml"), 1)
    assert plan.saving is None and plan.warnings == ()
    assert all("aving" not in line for line in closing_lines(plan))


def large_batch(times: str) -> str:
    return (
        f"stages.0.batch: 2,097,152 tokens per step are {times} times the best batch for this "
        "budget, N tokens by the fit of DeepSeek LLM (arXiv 2401.02954)"
    )


ONE_LAYER = (
    "stages.0.model.num_hidden_layers = 1: findings contradict each other. In Du et al. 2024 "
    "(section 4.2) a base of one layer was worse than no base; in arXiv 2511.04981 a base of 0 or "
    "1 layers was not, with a growth at 80% of the tokens, under WSD, without a second warm-up. "
)
FACTORS = "the paper recommends 2 to 4, and arXiv 2605.13405 found 2 the most reliable"


def test_a_late_growth_is_compared_with_both_findings() -> None:
    late = plan_run(load_run(CONFIGS / "late-1.1b.yaml"), 8)
    assert f"{ONE_LAYER}This run is like the latter" in late.warnings
    (said,) = (line for line in closing_lines(late) if "Tokens per parameter" in line)
    assert "last model: 16. A study of warm starts found the largest gains below 20" in said
    # Equation 2 gives 12.2B tokens for 97.5B after the growth; 5 times that is 61B.
    assert paper_plan("stages.0.tokens=60B").warnings == ()
    (long,) = paper_plan("stages.0.tokens=63B").warnings
    assert long.startswith("stages.1: the growth is after 6.3e+10 tokens (39% of the run), where ")
    assert "equation 2 gives 1.22e+10. Growths at 80% are published" in long


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("stages.0.model.num_hidden_layers=1",),
            [  # C = 6 x 51.4M x 10B = 3.08e18, whose best batch is 326K tokens
                large_batch("6.4"),
                ONE_LAYER + "This run grows at 9% of its tokens and has schedule.type = cosine and "
                "has growth.lr_schedule = rewarm",
                f"stages.1: the growth factor is 24.0; {FACTORS}",
            ],
        ),
        (
            ("stages.0.model.num_hidden_layers=4", "stages.0.batch.global_batch_size=512"),
            [f"stages.1: the growth factor is 6.0; {FACTORS}"],
        ),
        (
            ("stages.0.tokens=auto", "stages.1.tokens=1T"),
            [  # log10 d = 8.0001 + 163.27 / 21.869 - 5.74 = 9.7259; C = 9.84e18: 476K tokens
                "stages.0.tokens = auto: equation 2 gives N tokens, outside the range of its fit: "
                "C = 6ND = 7.4e+21 (fitted: up to 1.2e+21)",
                large_batch("4.4"),
            ],
        ),
    ],
)
def test_warnings(overrides: tuple[str, ...], said: list[str]) -> None:
    found = paper_plan(*overrides).warnings
    assert [re.sub(r"(gives|budget,) [\d,]+", r"\1 N", text) for text in found] == said


def test_every_growth_beyond_the_fit_is_warned_of() -> None:
    """6 x 1,233,225,728 x 1T FLOPs, whether or not the base's tokens were left to equation 2."""
    beyond = "C = 6ND = 7.4e+21 (fitted: up to 1.2e+21)"
    given = paper_plan("stages.1.tokens=1T").warnings
    assert given == (f"stages.1: equation 2 is outside its fitted range for this growth: {beyond}",)
    auto = paper_plan("stages.0.tokens=auto", "stages.1.tokens=1T").warnings
    assert [beyond in text for text in auto] == [True, False]


def test_what_does_not_fit_is_warned_of() -> None:
    run = load_run(CONFIGS / "gstack-1.1b.yaml")
    assert plan_run(run, 8, gpu_memory=80 * 10**9).warnings == ()
    (text,) = plan_run(run, 8, gpu_memory=40 * 10**9).warnings
    assert text.startswith("stages.1 does not fit: 43.1 of 37.3 GiB per GPU")


def test_parts_that_no_stage_has_are_left_out() -> None:
    flat = memory_rows([stage.memory for stage in paper_plan().stages])
    split = memory_rows([stage.memory for stage in paper_plan("parallel.zero_stage=3").stages])
    assert "weights gathered, at most" not in flat
    assert split["weights gathered, at most"] == ["0.818", f"{2 * 10**9 / 2**30:.3f}"]
    assert flat["fp32 masters and moments"] == [f"{1.5 * n / 2**30:.3f}" for n in (BASE, TARGET)]


def shown(plan: RunPlan, terminal: bool) -> str:
    console = Console(width=160, force_terminal=terminal, record=True, file=io.StringIO())
    print_plan(PlanResult(plan, None), console)
    return console.export_text()


def test_what_is_shown() -> None:
    plan = paper_plan("stages.0.tokens=null", "stages.0.at_tokens=10B")
    plain, framed = shown(plan, terminal=False), shown(plan, terminal=True)
    assert "gstack-1.1b on 8 ranks" in plain
    assert re.search(r"\| tokens +\| 10,001,317,888 \(at_tokens 10\.0B\) \| 97,5", plain)
    assert re.search(r"\| connection rate Rc +\| 87\.0% +\|", plain)
    assert "ZeRO 1, DP 8 x TP 1" in plain
    assert plain.isascii() and not framed.isascii()


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["megagrow", "plan", *words])
    megagrow.cli.app.main()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--world", "0"], "--world 0: use 1 or more ranks"),
        (
            ["--world", "3"],
            "stages.0.batch.global_batch_size = 1024 is not divisible by micro_batch_size x data "
            "parallel = 8 x 3",
        ),
        (
            ["--set", "stages.1.model.num_hidden_layers=25"],
            "stages.1.model.num_hidden_layers = 25 is not divisible",
        ),
        (["--set", "stages.1.at_tokens=1"], "'stages.1.tokens' and 'stages.1.at_tokens' each set"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, str(CONFIGS / "gstack-1.1b.yaml"), *words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and said in err


def test_the_command_prints_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, str(CONFIGS / "gstack-410m.yaml"), "--world", "4")
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "gstack-410m on 4 ranks" in out
    assert "740,001,054,720" in out
    assert "\x1b" not in out


def test_the_command_tells_costs_and_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--world", "8", "--gpu", "h100", "--gpu-memory", "20GB", "--mfu", "0.4")
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, str(CONFIGS / "gstack-1.1b.yaml"), *words)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "| Costs " in out and "| GPU-hours " in out and "scratch at +41%" in out
    assert "| attention itself " in out
    assert "Warning: stages.1 does not fit" in out and "of 18.6 GiB per GPU" in out


def test_problems_of_a_growth_are_refused() -> None:
    with pytest.raises(InputError, match="contains layer 7"):
        paper_plan(f"stages.1.growth.layer_map={[7] * 24}")
