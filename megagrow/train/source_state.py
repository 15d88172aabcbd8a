"""Run state recorded with a source of weights."""

from pydantic import ValidationError

from megagrow.checkpoint.discovery import FoundCheckpoint, step_of
from megagrow.checkpoint.manifest import Manifest
from megagrow.checkpoint.source import Source
from megagrow.config.load import recorded_run
from megagrow.errors import CheckpointError
from megagrow.growth.mask_schedule import stage_masks
from megagrow.train.growth_event.run_growths import as_grown
from megagrow.train.train_state import RunState

STILL_MASKED = (
    "growth masks are still ramping, and the model is not the same without them; train until they "
    "reach 1"
)
"""Error text for a masked source that cannot be used outside its run."""


def state_of_checkpoint(manifest: Manifest) -> RunState:
    """Return the run state of a checkpoint. Raises CheckpointError if it is invalid."""
    return RunState.from_json(manifest.run, manifest.environment)


def state_of_found(found: FoundCheckpoint) -> RunState:
    """Return the run state of a checkpoint that a run resumes from.

    Raises CheckpointError if it is invalid or records another step than the name of its folder.
    """
    path, manifest = found
    state = state_of_checkpoint(manifest)
    if step_of(path) != state.counters.step:
        raise CheckpointError(
            f"{path}: records step {state.counters.step}, but is named by step {step_of(path)}; "
            "restore its name or remove it"
        )
    return state


def state_of(source: Source) -> RunState:
    """Return the run state of a source; the initial state if it belongs to no run."""
    if source.run is None:
        return RunState()
    return RunState.from_json(source.run, source.environment)


def still_masked(source: Source) -> bool:
    """Return True if growth masks of the source are still ramping; masks belong to its run."""
    state = state_of(source)
    try:
        if "growth" in source.environment:  # grown from files, and not trained since
            return source.environment["growth"]["masks"] is not None
        config = source.environment.get("config", {})
        stages = config.get("stages", [])
        if not stages or stages[state.stage]["growth"] is None:
            return False
        run = as_grown(recorded_run(config), state)
    except (AttributeError, IndexError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{source.path}: the configuration recorded in it is unreadable, and with it whether "
            "its growth masks are still ramping; use another checkpoint"
        ) from error
    return stage_masks(run, state.stage, state.stage_tokens) is not None
