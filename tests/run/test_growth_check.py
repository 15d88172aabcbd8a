"""An exact growth that does not keep the function stops the run before a step, losing nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

import megagrow.train.growth_event.run_growths
from megagrow.checkpoint.manifest import read_manifest
from megagrow.growth.map import GrowthMap
from tests.helpers.jobs import records, train, write_run
from tests.helpers.run.refusals import assert_refused
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run

pytestmark = pytest.mark.dist

BEFORE, AFTER = 4, 3
DEEP = MODEL | {"num_hidden_layers": 4}


def a_new_layer_that_speaks(rank: int, patch: pytest.MonkeyPatch) -> None:
    """A defect in an operator: one of its silent layers is not silent."""
    growth_map = megagrow.train.growth_event.run_growths.growth_map

    def defective(*arguments: object) -> GrowthMap:
        found = growth_map(*arguments)
        speaking = "model.layers.1.self_attn.o_proj.weight"
        copied = found.weights["model.layers.0.self_attn.o_proj.weight"]
        weights = {**found.weights, speaking: copied}
        fills = {name: fill for name, fill in found.fills.items() if name != speaking}
        return replace(found, weights=weights, fills=fills)

    patch.setattr(megagrow.train.growth_event.run_growths, "growth_map", defective)


def test_the_run_stops_and_the_checkpoint_is_intact(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        [
            {"tokens": BEFORE * STEP_TOKENS, "optimizer": {"lr": 3e-2}},
            {
                "model": DEEP,
                "tokens": AFTER * STEP_TOKENS,
                "growth": {"operator": "zero_depth", "tolerance": 1e-7},
            },
        ],
    )
    path = write_run(tmp_path / "run.yaml", run)
    said = assert_refused(train(path, 2, a_new_layer_that_speaks).finish())
    assert said.startswith(f"the growth at step {BEFORE} by zero_depth should preserve")
    assert "no step was taken" in said
    assert [step for (step,) in records(run, "train", ["step"])] == list(range(1, BEFORE + 1))
    assert read_manifest(run.output_dir / "checkpoints" / f"step-{BEFORE:09d}").run["stage"] == 0
    assert train(path, 2).finish().codes == [0, 0], "without the defect the same command goes on"
    ((before, after),) = records(run, "growth", ["loss_before", "loss_after"])[-1:]
    assert before == after
