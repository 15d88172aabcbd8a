"""Validation sets of a run that resumes: added, removed, replaced."""

from pathlib import Path
from typing import Any

from megagrow.config.resume_rules import Effect
from megagrow.config.schema import RunConfig
from megagrow.train.config_changes import changes_since
from megagrow.train.data_setup import open_inputs
from megagrow.train.train_state import RunState
from tests.helpers.runs import STEP_TOKENS, make_run


def with_sets(run: RunConfig, sets: Any) -> RunConfig:
    values = run.model_dump()
    values["data"]["validation"] = sets
    return RunConfig.model_validate(values)


def since(then: RunConfig, now: RunConfig) -> dict[str, Effect]:
    recorded = {
        "config": then.model_dump(mode="json"),
        "contents": open_inputs(then).contents.model_dump(),
    }
    contents, model = open_inputs(now).contents, now.stages[0].model
    return {c.key: c.effect for c in changes_since(now, contents, RunState(), model, recorded)}


def test_sets_are_compared_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"tokens": 10 * STEP_TOKENS}])
    train, validation = tmp_path / "train", tmp_path / "validation"
    assert run.model_dump()["data"]["validation"] == [{"path": validation, "weight": 1.0}]
    added = with_sets(run, {"validation": validation, "code": train})
    assert since(run, added) == since(added, run) == {"data.validation.code": Effect.NONE}
    assert since(added, added) == since(run, run) == {}
    replaced = with_sets(run, {"validation": train, "code": train})
    assert since(added, replaced) == {
        "data.validation.validation.0.path": Effect.NONE,
        "data.validation.validation.0.contents": Effect.FROM_NOW_ON,
    }
    assert open_inputs(added).contents.model_dump()["validation"].keys() == {"validation", "code"}
    assert isinstance(open_inputs(run).contents.model_dump()["validation"], list)
