"""`megagrow`, of which rank 1 kills itself in the middle of a step before the first restart."""

import os
import signal
from typing import Any

import megagrow.train.loop
from megagrow.cli.app import main

DIES_IN_STEP = 5
train_step, steps = megagrow.train.loop.train_step, []


def dying(*arguments: Any) -> Any:
    """The step in which it dies is never done."""
    steps.append(None)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and len(steps) == DIES_IN_STEP:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*arguments)


if __name__ == "__main__":
    megagrow.train.loop.train_step = dying
    main()
