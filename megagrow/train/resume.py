"""Start of a run: initial weights, a checkpoint, or the target of a rewind.

A rewind is a resume within the running job. It is not written to disk: a run that is killed after
it resumes from the same checkpoint, fails at the same steps and rewinds again, with bit-identical
results.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megagrow.checkpoint.discovery import FoundCheckpoint, list_checkpoints, step_of
from megagrow.checkpoint.load import load_storage, newest_valid_on_all_ranks
from megagrow.checkpoint.manifest import parse_manifest
from megagrow.checkpoint.removal import hide_checkpoint
from megagrow.common.sizes import format_bytes
from megagrow.config.differences import ConfigChange
from megagrow.config.schema import RunConfig
from megagrow.data.corpus_identity import Contents
from megagrow.errors import CheckpointError, Diverged
from megagrow.parallel.agreement import run_on_rank_zero
from megagrow.train.config_changes import (
    changes_since_source,
    check_changes,
    checkpoint_changes,
)
from megagrow.train.growth_event.run_growths import as_grown
from megagrow.train.init_from import fill_beginning, open_beginning
from megagrow.train.kernel_calls import NO_CHECKS, Checks
from megagrow.train.source_state import state_of_checkpoint, state_of_found
from megagrow.train.stage import Stage, build_stage
from megagrow.train.train_state import RunState

logger = logging.getLogger(__name__)


class Beginning(NamedTuple):
    """Start of a run, or of its continuation."""

    run: RunConfig
    """The run with the operators that earlier growths chose."""
    stage: Stage
    state: RunState
    changes: list[ConfigChange]
    """Changes of the run since the checkpoint or the source was saved."""
    environment: dict[str, Any]
    """Environment recorded in the checkpoint or the source; empty for new weights."""


def begin(
    run: RunConfig,
    found: FoundCheckpoint | None,
    device: torch.device,
    contents: Contents,
    allowed: Sequence[str] = (),
    checks: Checks = NO_CHECKS,
) -> Beginning:
    """Build the stage and state of a checkpoint, or of the start of the run. Collective.

    Args:
        run: the run.
        found: the checkpoint; None starts with new weights or those of `init_from`.
        device: device of this rank.
        contents: identities of the run's corpora and tokenizer.
        allowed: keys whose changes may contradict the checkpoint (`--allow-change`).
        checks: result of `check_kernels`.

    Raises CheckpointError if the checkpoint belongs to another model, ConfigError if the run
    contradicts its configuration.
    """
    if found is None:
        source = open_beginning(run)
        changes, environment = [], dict[str, Any]()
        if source is not None:
            environment = source.environment
            find = partial(changes_since_source, run, contents, source)
            changes = _checked(find, allowed, f"init_from = {run.init_from}")
        stage = build_stage(run, 0, device, checks)
        rank, storage = stage.topology.rank, stage.engine.storage()
        stage.engine.ready(fill_beginning(source, stage.layout, rank, storage, run.seed))
        return Beginning(run, stage, RunState(), changes, environment)
    path, manifest = found
    state = state_of_found(found)
    changes = _checked(partial(checkpoint_changes, run, contents, manifest), allowed, str(path))
    run = as_grown(run, state)
    logger.info("loading %s | %s", path, format_bytes(manifest.size))
    stage = build_stage(run, state.stage, device, checks)
    stage.engine.ready(load_storage(path, manifest, stage.layout, stage.engine.storage()))
    return Beginning(run, stage, state, changes, manifest.environment)


def _checked(
    find: Callable[[], list[ConfigChange]], allowed: Sequence[str], origin: str
) -> list[ConfigChange]:
    """Return the changes that `find` returns on rank 0, checked by `check_changes`. Collective."""

    def found() -> list[ConfigChange]:
        changes = find()
        check_changes(changes, allowed, origin)
        return changes

    return run_on_rank_zero(found)


def rewind_target(
    run: RunConfig, directory: Path, state: RunState, reason: str
) -> tuple[FoundCheckpoint | None, RunState]:
    """Select the checkpoint to rewind to; returns it with the state after the rewind. Collective.

    The data between the checkpoint and `state` is skipped. The target is the newest good
    checkpoint; if no step succeeded since the last rewind, the one before its target. None means
    the initial state. Checkpoints that only a stop of the run caused are used if there is no other
    good one, so that a run that was stopped and resumed has the targets of an undisturbed one.
    Later checkpoints are renamed to .tmp. Raises Diverged if no rewinds are left.
    """
    stuck = state.counters.step - max(state.guard.skipped, state.guard.high)
    limit = stuck - 1 if stuck == state.guard.rewound_to else stuck
    found = _newest_good(directory, limit)
    target = RunState() if found is None else state_of_checkpoint(found[1])
    after = state.rewound_to(target)
    if found is not None and target.counters.step >= state.counters.step:
        raise Diverged(
            f"step {state.counters.step}: {reason}, and there is no checkpoint of an earlier step; "
            f"to restart from the initial state, move {found[0]} elsewhere"
        )
    if after.guard.rewinds > run.guards.max_rewinds:
        raise Diverged(
            f"step {state.counters.step}: {reason}, after {state.guard.rewinds} rewinds of "
            f"guards.max_rewinds = {run.guards.max_rewinds}; inspect the data from position "
            f"{target.counters.tokens + state.skipped_tokens} of the stream, and the learning rate"
        )
    run_on_rank_zero(lambda: _drop_later(directory, target))
    return found, after


def _newest_good(directory: Path, limit: int) -> FoundCheckpoint | None:
    """Return the newest valid checkpoint up to step `limit` that was not saved during an
    instability, preferably a scheduled one, else the newest valid one; None if there are no
    checkpoints. Collective.

    Raises CheckpointError if all are damaged: a run never restarts from scratch over them.
    """

    def preference(path: Path) -> tuple[bool, bool, int]:
        try:
            manifest = parse_manifest(path)
            state = state_of_checkpoint(manifest)
        except CheckpointError:  # `last_valid` reports it
            return False, False, -1
        good = state.counters.step <= limit and not state.guard.troubled
        return good, good and manifest.scheduled, state.counters.step

    return newest_valid_on_all_ranks(
        directory, lambda: sorted(list_checkpoints(directory), key=preference)
    )


def _drop_later(directory: Path, target: RunState) -> None:
    for path in list_checkpoints(directory):
        if step_of(path) > target.counters.step:
            hide_checkpoint(path)
