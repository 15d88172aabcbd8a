"""Outliers of the gradient norm are skipped, also after a resume, without a rewind."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import megagrow.train.loop
import megagrow.train.step
from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.checkpoint.manifest import read_manifest
from tests.helpers.checkpoint.written import differences, shards
from tests.helpers.jobs import records, train, write_run
from tests.helpers.runs import STEP_TOKENS, make_run

STEPS, SAVED = 12, 8
OUTLIERS = {7: 1e2, 11: 1e6}
"""Step -> factor on its gradients; the first one widens the limits of the second."""
FIELDS = ("step", "skipped", "loss", "grad_norm", "skipped_steps", "rewinds", "tokens")


def steep(rank: int, patch: pytest.MonkeyPatch) -> None:
    """The gradients of OUTLIERS are larger on rank 1."""
    loss_of, last = megagrow.train.step._chunk_output, [0]
    measured = megagrow.train.loop._measured_step

    def stepping(run: Any, stage: Any, state: Any, *arguments: Any) -> Any:
        last[0] = state.counters.step + 1
        return measured(run, stage, state, *arguments)

    def scaling(*arguments: Any) -> Any:
        loss = loss_of(*arguments)
        if rank == 1 and last[0] in OUTLIERS and loss.requires_grad:
            loss.register_hook(lambda gradient: OUTLIERS[last[0]] * gradient)
        return loss

    patch.setattr(megagrow.train.loop, "_measured_step", stepping)
    patch.setattr(megagrow.train.step, "_chunk_output", scaling)


@pytest.mark.dist
def test_outliers_are_skipped_and_a_resume_skips_the_same(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        [{"tokens": STEPS * STEP_TOKENS}],
        guards={"skip_step": {"window": 12, "sigma_factor": 6}, "max_skipped_steps": 1},
        checkpoint={"interval": SAVED, "keep_last": 3},
    )
    path = write_run(tmp_path / "run.yaml", run)
    done = train(path, 2, steep).finish()
    assert done.codes == [0, 0], done.err
    undisturbed = records(run, "train", FIELDS)
    assert [step for step, skipped, *_ in undisturbed if skipped] == list(OUTLIERS)
    assert all(math.isfinite(norm) for _, _, _, norm, *_ in undisturbed)
    assert undisturbed[-1][-3:] == (len(OUTLIERS), 0, STEPS * STEP_TOKENS)
    assert done.out[0].count(" | skipped | loss ") == len(OUTLIERS)
    last = run.output_dir / "checkpoints" / checkpoint_name(STEPS)
    assert read_manifest(last).adam_step == STEPS - len(OUTLIERS)
    right = shards(last)
    shutil.rmtree(last)
    assert train(path, 2, steep).finish().codes == [0, 0]
    assert records(run, "train", FIELDS) == undisturbed
    assert differences(shards(last), right) == []
