"""A run that resumes with another configuration: differences found, refused, allowed."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megagrow.checkpoint.source import Source
from megagrow.config.differences import ConfigChange
from megagrow.config.load import load_run
from megagrow.config.resume_rules import Effect
from megagrow.config.schema import RunConfig
from megagrow.data.corpus_identity import Contents
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.errors import CheckpointError, ConfigError, InputError
from megagrow.formats.hugging_face_origin import ORIGIN_KEY
from megagrow.formats.hugging_face_tokenizer import tokenizer_files
from megagrow.parallel.sharding import StateKind
from megagrow.reshard.layout import Block
from megagrow.train.config_changes import changes_since, changes_since_source, check_changes
from megagrow.train.data_setup import open_inputs
from megagrow.train.train_state import RunState
from tests.helpers.jobs import write_run
from tests.helpers.logs import captured_logs
from tests.helpers.reshard.models import layout_of
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run, write_corpus

GROWTH = {"operator": "random_depth", "lr_schedule": "continue"}
DEEP = MODEL | {"num_hidden_layers": 4}


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """A run of two stages, ten steps each."""
    stages = [{"tokens": 10 * STEP_TOKENS}] * 2
    return make_run(tmp_path, [stages[0], stages[1] | {"model": DEEP, "growth": GROWTH}])


def changed(run: RunConfig, *overrides: str) -> RunConfig:
    """Return the run loaded from its file with overrides."""
    return load_run(write_run(run.output_dir.with_suffix(".yaml"), run), overrides)


def since(*arguments: Any) -> dict[str, Effect]:
    """Return the changed keys of `changes_between` with their effects."""
    return {change.key: change.effect for change in changes_between(*arguments)}


def changes_between(
    then: RunConfig,
    now: RunConfig,
    state: RunState,
    environment: Mapping[str, Any] | None = None,
    contents: Contents | None = None,
) -> list[ConfigChange]:
    """Return the changes since a checkpoint of `then`, which by default records its config."""
    if environment is None:
        environment = {"config": then.model_dump(mode="json")}
    model = then.stages[min(state.stage, len(then.stages) - 1)].model
    return changes_since(now, contents, state, model, environment)


MIDDLE = RunState(stage=0, stage_tokens=5 * STEP_TOKENS)
GROWN = RunState(stage=1, stage_tokens=5 * STEP_TOKENS)


def test_an_unchanged_run_has_no_changes(run: RunConfig) -> None:
    for state in (RunState(), MIDDLE, GROWN):
        assert since(run, changed(run), state) == {}


@pytest.mark.parametrize(
    ("state", "override", "effect"),
    [
        (MIDDLE, "logging.interval=7", Effect.NONE),
        (MIDDLE, "checkpoint.interval=7", Effect.FROM_NOW_ON),
        (MIDDLE, "stages.0.parallel.zero_stage=3", Effect.ROUNDING),
        (MIDDLE, "stages.0.optimizer.betas=[0.9, 0.99]", Effect.FROM_NOW_ON),
        (MIDDLE, "stages.0.tokens=1280", Effect.FROM_NOW_ON),
        (MIDDLE, "stages.0.tokens=256", Effect.CONTRADICTION),
        (GROWN, "stages.0.tokens=1280", Effect.CONTRADICTION),
        (MIDDLE, "stages.1.growth.copy_order=tiled", Effect.FROM_NOW_ON),
        (GROWN, "stages.1.growth.optimizer_state=reset", Effect.CONTRADICTION),
        (GROWN, "stages.1.growth.copy_order=tiled", Effect.NONE),  # random_depth has no use of it
        (MIDDLE, "stages.1.growth.operator=direct_depth", Effect.FROM_NOW_ON),
        (GROWN, "stages.1.growth.operator=direct_depth", Effect.FIXED),
        (MIDDLE, "seed=7", Effect.CONTRADICTION),
        (MIDDLE, "data.sequence_length=8", Effect.CONTRADICTION),
        (MIDDLE, "stages.0.model.rope_theta=5e5", Effect.CONTRADICTION),
        (MIDDLE, "stages.0.model.vocab_size=128", Effect.FIXED),
    ],
)
def test_each_class(run: RunConfig, state: RunState, override: str, effect: Effect) -> None:
    key = override.partition("=")[0].replace("data.", "stages.0.data.")
    assert since(run, changed(run, override), state)[key] is effect


@pytest.mark.parametrize("fixed", ["", "stages.0.schedule.warmup_steps=null"])
def test_a_batch_does_not_stretch_a_warm_up_in_steps(run: RunConfig, fixed: str) -> None:
    tokens = "stages.0.schedule.warmup_tokens=192"  # the three steps of `make_run`
    larger = changed(run, "stages.0.batch.global_batch_size=8", *([fixed, tokens] if fixed else []))
    found = since(run, larger, MIDDLE)
    assert found.pop("stages.0.batch.global_batch_size") is Effect.FROM_NOW_ON
    steps, tokens = "stages.0.schedule.warmup_steps", "stages.0.schedule.warmup_tokens"
    implied = {tokens: Effect.CONTRADICTION}
    assert found == ({steps: Effect.NONE, tokens: Effect.NONE} if fixed else implied)


def test_a_longer_stage_does_not_stretch_its_masks(run: RunConfig) -> None:
    longer = changed(run, "stages.1.tokens=1280")
    key = "stages.1.growth.ramp_tokens"  # by default the length of this stage
    assert since(run, longer, GROWN)[key] is Effect.CONTRADICTION
    kept = changed(run, "stages.1.tokens=1280", f"{key}=640")
    found = changes_between(run, kept, GROWN)
    assert [str(change) for change in found if change.key == key] == [f"{key}: null -> 640 (none)"]


def test_contradictions_name_key_values_and_flag(run: RunConfig) -> None:
    now = changed(run, "seed=7", "stages.0.optimizer.lr=0.5")
    found = changes_between(run, now, MIDDLE)
    with pytest.raises(ConfigError, match=r"step-4: .* seed: 1234 -> 7; .* --allow-change seed$"):
        check_changes(found, [], "step-4")
    for allowed in ("seed", "all"):
        check_changes(found, [allowed], "step-4")
    with pytest.raises(ConfigError, match="seed"):
        check_changes(found, ["see", "seed.x"], "step-4")


def test_a_section_allows_its_keys_and_nothing_allows_another_model(run: RunConfig) -> None:
    now = changed(run, "data.reset_attention_mask=true", "data.reset_position_ids=true")
    found = changes_between(run, now, MIDDLE)
    check_changes(found, ["data"], "step-4")
    wider = changed(run, "stages.0.model.vocab_size=128", "stages.1.model.vocab_size=128")
    found = changes_between(run, wider, MIDDLE)
    with pytest.raises(CheckpointError, match=r"does not fit the run: .*vocab_size: 101 -> 128"):
        check_changes(found, ["all"], "step-4")


def test_a_checkpoint_of_a_removed_stage_is_refused(run: RunConfig) -> None:
    single = run.model_copy(update={"stages": run.stages[:1]})
    assert since(run, single, GROWN) == {"stages.1": Effect.FIXED}
    assert since(run, single, MIDDLE) == {"stages.1": Effect.FROM_NOW_ON}


def test_corpora_are_compared_by_their_contents(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_inputs(run).contents
    recorded = {"config": run.model_dump(mode="json"), "contents": before.model_dump()}
    for end in (".bin", ".idx"):
        (tmp_path / f"train{end}").rename(tmp_path / f"moved{end}")
    moved = changed(run, f"data.train.0.path={tmp_path / 'moved'}")
    paths = {f"stages.{index}.data.train.0.path": Effect.NONE for index in (0, 1)}
    contents = {
        "stages.0.data.train.0.contents": Effect.CONTRADICTION,
        "stages.1.data.train.0.contents": Effect.FROM_NOW_ON,
    }
    assert since(run, moved, MIDDLE, recorded, open_inputs(moved).contents) == paths
    write_corpus(tmp_path / "train", seed=5)
    assert since(run, run, MIDDLE, recorded, open_inputs(run).contents) == contents
    config = recorded["config"]
    earlier = {"config": config}  # without recorded contents, paths are compared
    assert since(run, moved, MIDDLE, earlier, open_inputs(moved).contents) == paths | contents
    monkeypatch.chdir(tmp_path)
    config["data"]["validation"][0]["path"] = "validation"
    for stage in config["stages"]:
        stage["data"]["train"][0]["path"] = "train"
    found = since(run, run, MIDDLE, earlier, open_inputs(run).contents)
    assert set(found.values()) == {Effect.NONE}, "a relative path is the same path"


def test_tokenizers_are_compared_where_both_are_known(run: RunConfig) -> None:
    contents = open_inputs(run).contents
    assert contents.tokenizer is None
    recorded: dict[str, Any] = {"config": run.model_dump(mode="json")}
    for old, new, expected in (("a", "b", True), ("a", "a", False), (None, "b", False)):
        recorded["contents"] = contents.model_copy(update={"tokenizer": old}).model_dump()
        now = contents.model_copy(update={"tokenizer": new})
        found = since(run, run, MIDDLE, recorded, now)
        assert found == ({"data.tokenizer_contents": Effect.CONTRADICTION} if expected else {})


def test_the_tokenizer_of_a_folder_is_compared_by_its_ids(run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    texts = ["quick brown foxes jump over lazy dogs " * 50, "sphinx of black quartz vows it " * 50]
    for name, text in zip(("own", "other"), texts, strict=True):
        train_sentencepiece([text], 290, tmp_path / f"{name}.model")
    folder.mkdir()
    source: Any = SimpleNamespace(environment={ORIGIN_KEY: {"folder": str(folder)}})

    def found(name: str) -> list[ConfigChange]:
        return changes_since_source(changed(run, f"data.tokenizer={tmp_path / name}"), None, source)

    assert found("own.model") == [], "a folder without a tokenizer"
    for file, document in tokenizer_files(tmp_path / "own.model", 300).documents.items():
        (folder / file).write_text(json.dumps(document))
    assert found("own.model") == [], "the same tokenizer in another format"
    assert changes_since_source(run, None, source) == [], "the run's tokenizer is not known"
    (change,) = found("other.model")
    with pytest.raises(InputError, match=rf"{folder} \(\w{{12}}\) -> {tmp_path}/other.model \("):
        check_changes([change], (), f"init_from = {folder}")
    check_changes([change], ["data.tokenizer_contents"], f"init_from = {folder}")


def test_a_checkpoint_without_a_configuration_is_compared_by_its_model(run: RunConfig) -> None:
    assert since(run, changed(run, "seed=7"), MIDDLE, {}) == {}
    wider = changed(run, "stages.0.model.vocab_size=128", "stages.1.model.vocab_size=128")
    assert since(run, wider, MIDDLE, {}) == {"stages.0.model.vocab_size": Effect.FIXED}


def test_a_growth_between_files_is_compared_with_the_run(run: RunConfig) -> None:
    base = run.model_copy(update={"stages": run.stages[:1]})
    options = run.stages[1].growth
    assert options is not None
    growth = {"options": options.model_dump(mode="json"), "stream": "1234/stage-1"}
    environment = {"config": base.model_dump(mode="json"), "growth": growth}
    start = RunState(stage=1)
    assert since(run, run, start, environment) == {}
    growth["stream"] = "7/stage-1"
    growth["options"] = options.model_copy(update={"copy_order": "tiled"}).model_dump(mode="json")
    assert since(run, run, start, environment) == {
        "seed": Effect.CONTRADICTION,
        "stages.1.growth.copy_order": Effect.CONTRADICTION,
    }
    growth["options"] = options.model_dump(mode="json")
    seeded = run.model_copy(update={"seed": 7})  # the seed of the growth, not of the base
    assert since(run, seeded, start, environment) == {"seed": Effect.CONTRADICTION}


class Recorded(Source):
    """A source without tensors."""

    def read(self, name: str, kind: StateKind, block: Block) -> torch.Tensor:
        raise AssertionError(name)


def test_a_grown_source_is_compared_by_its_own_model(run: RunConfig) -> None:
    base, model = run.model_copy(update={"stages": run.stages[:1]}), run.stages[1].model
    source = Recorded(
        path=Path("grown"),
        model=model,
        layout=layout_of(model, 1, 1, 1),
        files=(),
        run=RunState(stage=1).as_json(),
        environment={"config": base.model_dump(mode="json")},
    )
    first = run.stages[0].model_copy(update={"model": model})
    grown = run.model_copy(update={"stages": [first], "init_from": Path("grown"), "seed": 7})
    changes = changes_since_source(grown, None, source)
    assert [str(each) for each in changes] == ["seed: 1234 -> 7 (from now on)"]
    check_changes(changes, [], "grown")


def test_a_probe_may_be_replaced_by_the_operator_it_chose(run: RunConfig) -> None:
    probe = "stages.1.growth.probe={operators: [random_depth, zero_depth]}"
    state, at = replace(GROWN, operators=(("random_depth",),)), "stages.1.growth"
    probed = changed(run, f"{at}.operator=direct_depth", probe)
    both = {f"{at}.operator": Effect.NONE, f"{at}.probe": Effect.NONE}
    assert since(probed, run, state) == since(run, probed, state) == both
    other = changed(run, f"{at}.operator=zero_depth")
    assert since(probed, other, state)[f"{at}.operator"] is Effect.FIXED
    longer = changed(probed, "stages.1.tokens=1280")  # the chosen operator has masks
    assert since(probed, longer, state)[f"{at}.ramp_tokens"] is Effect.CONTRADICTION


def test_keys_of_another_version_are_not_compared(run: RunConfig) -> None:
    config = run.model_dump(mode="json") | {"later": 1}
    config["stages"][1]["optimizer"]["later"] = {"x": 1}
    with captured_logs() as messages:
        found = since(run, changed(run, "seed=7"), MIDDLE, {"config": config})
    assert found == {"seed": Effect.CONTRADICTION}
    assert messages == ["recorded by another version, ignored: stages.1.optimizer.later, later"]


@pytest.mark.parametrize(
    "environment",
    [
        {"growth": {"options": {"operator": 3}, "stream": "1/stage-1"}},
        {"growth": {"options": {}, "stream": "x"}},
        {"growth": 5},
        {"contents": {"train": ["x"], "validation": ["x\ny"], "tokenizer": None}},
        {"contents": {"train": [], "validation": [], "tokenizer": None}},
        {"contents": {"train": 3}},
        {"config": {"stages": 3}},
    ],
)
def test_damaged_records_raise_no_traceback(run: RunConfig, environment: dict[str, Any]) -> None:
    recorded = {"config": run.model_dump(mode="json")} | environment
    try:
        since(run, run, GROWN, recorded, open_inputs(run).contents)
    except InputError as error:
        assert "recorded in the checkpoint" in str(error)
        assert "pydantic" not in str(error)
