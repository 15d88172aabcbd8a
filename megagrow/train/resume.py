"""Where a run begins: with its first weights, with a checkpoint, or, after a rewind, there again.

A rewind is a resume within the running job. Nothing is written for it: a run that dies after it
goes on from the same checkpoint, sees the same steps fail and rewinds again, to the same bits.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from megagrow.checkpoint.discovery import FoundCheckpoint, valid_checkpoints
from megagrow.checkpoint.files import list_checkpoints, step_of
from megagrow.checkpoint.load import load_storage
from megagrow.checkpoint.manifest import Manifest, read_manifest, verify_checkpoint
from megagrow.common.atomic_files import staging_folder
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.errors import CheckpointError, Diverged
from megagrow.parallel.agreement import run_on_rank_zero
from megagrow.train.growth_event.run_growths import as_grown
from megagrow.train.init_from import fill_beginning, open_beginning
from megagrow.train.stage import Stage, build_stage
from megagrow.train.train_state import RunState


def begin(
    run: RunConfig, found: FoundCheckpoint | None, device: torch.device, say: Callable[[str], None]
) -> tuple[RunConfig, Stage, RunState]:
    """The run as it has grown, its stage and its state, from a checkpoint or from nothing; all
    ranks together. InputError if the checkpoint is not one of this run."""
    if found is None:
        source = open_beginning(run, say)
        stage = build_stage(run, 0, device)
        rank, storage = stage.topology.rank, stage.engine.storage()
        stage.engine.ready(fill_beginning(source, stage.layout, rank, storage, run.seed))
        return run, stage, RunState()
    path, manifest = found
    state = RunState.from_json(manifest.run)
    _check_same_model(run, state, path, manifest)
    run = as_grown(run, state)
    stage = build_stage(run, state.stage, device)
    load_storage(path, manifest, stage.layout, stage.engine.storage())
    stage.engine.ready(manifest.adam_step)
    return run, stage, state


def rewind_target(
    run: RunConfig, directory: Path, state: RunState, reason: str, say: Callable[[str], None]
) -> tuple[FoundCheckpoint | None, RunState]:
    """The checkpoint to which a run in trouble goes back, and its state from there on: what lay
    between is behind it, and is not read again. None is the initial state; all ranks together.

    The newest good one; but from one that the run could not leave since it last went back there,
    to the one before it. Later checkpoints lose their names. Diverged, if no rewind is left.
    """
    stuck = state.counters.step - max(state.guard.skipped, state.guard.high)
    limit = stuck - 1 if stuck == state.guard.rewound_to else stuck
    found = run_on_rank_zero(lambda: _newest_good(directory, limit, say))
    target = RunState() if found is None else RunState.from_json(found[1].run)
    after = state.rewound_to(target)
    if after.guard.rewinds > run.guards.max_rewinds:
        raise Diverged(
            f"step {state.counters.step}: {reason}, after {state.guard.rewinds} rewinds of "
            f"guards.max_rewinds = {run.guards.max_rewinds}; look at the data from position "
            f"{target.counters.tokens + state.skipped_tokens} of the stream on, and at the "
            "learning rate"
        )
    run_on_rank_zero(lambda: _drop_later(directory, target))
    return found, after


def _newest_good(directory: Path, limit: int, say: Callable[[str], None]) -> FoundCheckpoint | None:
    """Return the newest valid checkpoint of at most `limit` steps saved in an untroubled state.

    Without such a checkpoint, return the newest valid one.
    """

    def rank(path: Path) -> tuple[bool, int]:
        state = RunState.from_json(read_manifest(path).run)
        good = state.counters.step <= limit and not state.guard.troubled
        return good, state.counters.step

    ranked = valid_checkpoints(list_checkpoints(directory), rank, say)
    newest_first = [path for path, _ in sorted(ranked, key=lambda item: item[1], reverse=True)]
    return next(valid_checkpoints(newest_first, verify_checkpoint, say), None)


def _drop_later(directory: Path, target: RunState) -> None:
    for path in list_checkpoints(directory):
        if step_of(path) > target.counters.step:
            path.rename(staging_folder(path))


def _check_same_model(run: RunConfig, state: RunState, path: Path, manifest: Manifest) -> None:
    where, stages = f"{path.parent}: its newest checkpoint", run.stages
    if state.stage >= len(stages):
        raise CheckpointError(
            f"{where} is of stage {state.stage}, the run has {len(stages)} stages"
        )
    model = stages[state.stage].model.model_dump()
    for key, value in ModelConfig(**manifest.model).model_dump().items():
        if model.get(key) != value:
            raise CheckpointError(
                f"{where} is of another model: {key} is {value}, stage {state.stage} of the run "
                f"says {model.get(key)}; set another output_dir or the same model"
            )
