"""A rank that dies under torchrun: the restart goes on by itself, to the same bits."""

from pathlib import Path
from typing import Any

import pytest

from megagrow.config.schema import RunConfig
from tests.helpers.jobs import records, train, write_run
from tests.helpers.run.dies_once import DIES_IN_STEP
from tests.helpers.run.launchers import SECONDS, start
from tests.helpers.runs import STEP_TOKENS, make_run

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SCRIPT = Path(__file__).resolve().parents[1] / "helpers/run/dies_once.py"
INTERVAL, STEPS = 3, 8


def run_of(folder: Path, name: str) -> RunConfig:
    # The one that dies does so soon after a save, which has to be on the disk by then.
    checkpoint = {"interval": INTERVAL, "background": False}
    stages = [{"tokens": STEPS * STEP_TOKENS}]
    return make_run(folder, stages, output_dir=folder / name, checkpoint=checkpoint)


def ended(run: RunConfig) -> tuple[list[tuple[Any, ...]], list[bytes]]:
    """All that was trained, and the bytes of the last checkpoint."""
    folder = run.output_dir / "checkpoints" / f"step-{STEPS:09d}"
    return (
        records(run, "train", ("step", "tokens", "loss", "lr", "grad_norm", "position")),
        [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))],
    )


def begun(run: RunConfig) -> list[int]:
    return [step for (step,) in records(run, "start", ["step"])]


def test_torchrun_restarts_and_the_run_goes_on(tmp_path: Path) -> None:
    whole, restarted = run_of(tmp_path, "whole"), run_of(tmp_path, "restarted")
    assert train(write_run(tmp_path / "whole.yaml", whole), 2).finish().codes == [0, 0]
    process = start(
        *("torchrun", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1),
        *(SCRIPT, "train", write_run(tmp_path / "restarted.yaml", restarted)),
    )
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err
    assert INTERVAL < DIES_IN_STEP < STEPS
    assert (begun(whole), begun(restarted)) == ([0], [0, INTERVAL])
    trained, written = ended(whole)
    assert len(trained) == STEPS and written
    assert ended(restarted) == (trained, written)
