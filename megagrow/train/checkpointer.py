"""Checkpoints of a run: asynchronous saves during training, and retention."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from megagrow.checkpoint.async_saver import Saved, Saver
from megagrow.checkpoint.discovery import FoundCheckpoint, step_of
from megagrow.checkpoint.load import newest_valid_on_all_ranks
from megagrow.checkpoint.manifest import BEFORE_GROWTH, Manifest, describe_layout
from megagrow.checkpoint.removal import finish_replacements
from megagrow.checkpoint.retention import Pruner, Retention
from megagrow.checkpoint.save import total_bytes
from megagrow.checkpoint.shards import own_tensors
from megagrow.common.atomic_files import check_room
from megagrow.config.schema import RunConfig
from megagrow.errors import InputError
from megagrow.formats.hugging_face_origin import ORIGIN_KEY
from megagrow.parallel.agreement import run_on_rank_zero
from megagrow.train.reporting.run_logger import RunLogger
from megagrow.train.stage import Stage
from megagrow.train.train_state import RunState

logger = logging.getLogger(__name__)


class Checkpointer:
    """Checkpoint writer of a run, as `loop.Background` of its training. A context manager.

    If an InputError leaves the context, a running save is completed first. All methods except
    `busy`, `due` and `inherit` are collective. Methods that return a state add the time for which
    saves blocked training to its counters.
    """

    def __init__(
        self,
        run: RunConfig,
        rank: int,
        device: torch.device,
        environment: dict[str, Any],
        run_logger: RunLogger,
    ) -> None:
        self._run = run
        self._rank = rank
        self._environment = environment
        self._run_logger = run_logger
        self._saver = Saver(self.directory, device)
        # `keep_before_growth` applies when a checkpoint is saved; protected ones stay.
        options = run.checkpoint
        self._pruner = Pruner(self.directory, Retention(options.keep_last, options.keep_every))
        self._stalled = 0.0
        self._begun = time.monotonic()
        """Start of the newest save; before the first one, start of training in this process."""
        self.last_step = 0
        """Step of the newest checkpoint, which may still be written; 0 if there is none."""

    @property
    def directory(self) -> Path:
        """Directory of the run's checkpoints."""
        return self._run.output_dir / "checkpoints"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if isinstance(error, InputError):  # raised on all ranks
            with suppress(InputError):
                self._saver.finish()
        if error is None or isinstance(error, InputError):
            self._pruner.wait()

    def newest(self) -> FoundCheckpoint | None:
        """Return the newest valid checkpoint, None if there is none; call before any save.

        A replacement that a crash interrupted is completed first. Raises CheckpointError if all
        checkpoints are damaged.
        """
        run_on_rank_zero(lambda: finish_replacements(self.directory))
        found = newest_valid_on_all_ranks(self.directory)
        self.rewound_to(found)
        return found

    def rewound_to(self, found: FoundCheckpoint | None) -> None:
        """Record the checkpoint from which training continues."""
        self._begun = time.monotonic()
        self.last_step = 0 if found is None else step_of(found[0])
        if found is not None:
            self._pruner.record(found[0], True)

    def inherit(self, environment: Mapping[str, Any]) -> None:
        """Record the Hugging Face origin of the weights that the run starts from.

        `environment` is that of the checkpoint or model before. Exports need its files.
        """
        if ORIGIN_KEY in environment:
            self._environment = self._environment | {ORIGIN_KEY: environment[ORIGIN_KEY]}

    def prepare(self, stage: Stage) -> None:
        """Allocate the buffers of a stage.

        Warns if the disk has no space for one checkpoint: the run would fail at its next save.
        """
        storage = stage.engine.storage()
        if self._run.checkpoint.background:
            self._saver.prepare(stage.layout, storage)
            stage.engine.before_update(self._saver.wait_for_copy)
        needed = total_bytes(own_tensors(stage.layout, storage, self._rank))
        if self._rank == 0:
            try:
                check_room(self.directory, needed)
            except InputError as error:
                logger.warning("not enough disk space for one checkpoint: %s", error)

    def save(self, stage: Stage, state: RunState, *, stopped: bool = False) -> RunState:
        """Save a state, in the background unless it is the last of its stage.

        `stopped` marks a save that only a stop of the run caused; it is not in the background.
        Waits for the previous save first. Raises InputError as `Saver` does, and if the metrics up
        to this state cannot be written.
        """
        state = self.finish(state)
        options = self._run.checkpoint
        ended = state.stage_tokens >= stage.config.tokens
        grows = ended and any(s.growth for s in self._run.stages[stage.index + 1 :][:1])
        wait = stopped or ended or not options.background
        manifest = Manifest(
            stage.config.model.model_dump(),
            describe_layout(stage.layout),
            stage.engine.adam_step,
            state.as_json(),
            self._environment,
            files={},
            protected=BEFORE_GROWTH if grows and options.keep_before_growth else None,
            scheduled=not stopped,
        )
        self._run_logger.sync()
        storage, step = stage.engine.storage(), state.counters.step
        due = run_on_rank_zero(lambda: self._due(step))
        self._saver.begin(step, stage.layout, storage, manifest, not wait, due)
        self.last_step, self._begun = step, time.monotonic()
        if wait:
            self.idle_everywhere()
        return self.account(state)

    def busy(self) -> bool:
        """Return True while this rank is writing."""
        return self._saver.writing

    def due(self) -> bool:
        """Return True on rank 0 if the time between checkpoints has passed."""
        seconds = self._run.checkpoint.seconds
        passed = seconds is not None and time.monotonic() - self._begun >= seconds
        return passed and self._rank == 0

    def idle_everywhere(self) -> None:
        """Wait for this rank's save, publish the checkpoint and start to prune old ones."""
        saved = self._saver.finish()
        if saved is None:
            return
        if self._rank == 0:
            self._prune(saved)
        self._stalled += saved.stall_seconds
        at = RunState.from_json(saved.manifest.run, self._environment)
        self._run_logger.checkpoint(at, saved.path, saved.stall_seconds, saved.seconds)

    def account(self, state: RunState) -> RunState:
        """Add the time for which saves blocked training since the last call."""
        stalled, self._stalled = self._stalled, 0.0
        return state.add_lost_time(stalled) if stalled else state

    def finish(self, state: RunState) -> RunState:
        """Wait for the running save, if any, and for the removal of old checkpoints."""
        self.idle_everywhere()
        self._pruner.wait()
        return self.account(state)

    def release(self) -> None:
        """Free the host memory that background saves are written from."""
        self._saver.release()

    def _due(self, step: int) -> list[Path]:
        self._run_logger.check()
        return self._pruner.due(step)

    def _prune(self, saved: Saved) -> None:
        for path, problem in saved.verified.items():
            self._pruner.record(path, problem is None)
            if problem is not None:
                logger.warning("%s; the checkpoint does not count for keep_last", problem)
        self._pruner.record(saved.path, True)
        self._pruner.start()
