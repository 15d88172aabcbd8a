"""Runs of one process that a signal stops, and the state they leave."""

import os
import signal
from typing import Any

import pytest

from megagrow.checkpoint.discovery import list_checkpoints
from megagrow.checkpoint.manifest import read_manifest
from megagrow.config.schema import RunConfig
from megagrow.run import train
from megagrow.train import loop
from megagrow.train.reporting.run_logger import RunLogger
from tests.helpers.jobs import records


def stopped_at(run: RunConfig, step: int) -> bool:
    """Train until a signal in `step`; return True if the signal stopped the run.

    The signal arrives before the vote on the next step, or after the last step of a stage.
    """
    record, vote, sent = RunLogger.step, loop._vote, []

    def send(now: bool) -> None:
        if now and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    def recording(self: RunLogger, event: Any) -> None:
        record(self, event)
        send(event.state.counters.step == step)

    def voting(*arguments: Any) -> Any:
        send(arguments[-1] == step + 1)
        return vote(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogger, "step", recording)
        patch.setattr(loop, "_vote", voting)
        return train(run) is not None


def last_state(run: RunConfig) -> tuple[int, list[bytes], list[Any]]:
    """Return tokens and shards of the last checkpoint, and the losses of the validations."""
    path = list_checkpoints(run.output_dir / "checkpoints")[-1]
    tokens = read_manifest(path).run["counters"]["tokens"]
    shards = [file.read_bytes() for file in sorted(path.glob("*.safetensors"))]
    return tokens, shards, records(run, "train", ("step", "tokens", "loss", "lr"))[-1:]
