"""A rank that dies under torchrun: the restart goes on by itself, to the same bits."""

from pathlib import Path

import pytest

from tests.jobs import records, write_run
from tests.run.dies_once import DIES_IN_STEP
from tests.run.test_launchers import SECONDS, start
from tests.runs import STEP_TOKENS, make_run

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("dies_once.py")
INTERVAL, STEPS = 3, 8


def test_torchrun_restarts_and_the_run_goes_on(tmp_path: Path) -> None:
    # The one that dies does so soon after a save, which has to be on the disk by then.
    checkpoint = {"interval": INTERVAL, "background": False}
    ended = []
    for name, restarts in (("whole", None), ("restarted", 1)):
        stages = [{"tokens": STEPS * STEP_TOKENS}]
        run = make_run(tmp_path, stages, output_dir=tmp_path / name, checkpoint=checkpoint)
        path = write_run(tmp_path / f"{name}.yaml", run)
        module = ["-m", "megagrow"] if restarts is None else [SCRIPT]
        again = [] if restarts is None else ["--max-restarts", restarts]
        process = start(
            "torchrun", "--standalone", "--nproc-per-node", 2, *again, *module, "train", path
        )
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, out + err
        begun = [step for (step,) in records(run, "start", ["step"])]
        assert begun == ([0] if restarts is None else [0, INTERVAL])
        folder = run.output_dir / "checkpoints" / f"step-{STEPS:09d}"
        ended.append(
            (
                records(run, "train", ("step", "tokens", "loss", "lr", "grad_norm", "position")),
                [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))],
            )
        )
    assert INTERVAL < DIES_IN_STEP < STEPS
    assert len(ended[0][0]) == STEPS
    assert ended[0] == ended[1]
