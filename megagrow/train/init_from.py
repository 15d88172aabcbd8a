"""The numbers with which a run begins: initial weights, or those of a model that exists.

`init_from` is a checkpoint, a run (its newest checkpoint), or a Hugging Face folder. Moments and
Adam's step count come with the weights where there are any, but for instruction tuning, whose loss
is another one; tokens, schedule and data begin anew.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megagrow.checkpoint.source import Source
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.errors import ConfigError
from megagrow.formats.open_source import find_source, open_found
from megagrow.parallel.agreement import run_on_all_ranks, run_on_rank_zero
from megagrow.parallel.engine import Storage
from megagrow.reshard.fill import fill_initial, fill_read
from megagrow.reshard.layout import Layout
from megagrow.train.source_state import STILL_MASKED, still_masked

_FREE = ("initializer_range", "max_position_embeddings")
"""Fields of a model that no weight depends on."""


def open_beginning(run: RunConfig, say: Callable[[str], None]) -> Source | None:
    """The model that a run begins with; None where it begins with initial weights. Collective.

    InputError if it is not there, or is not the model of the first stage.
    """
    path = run.init_from
    if path is None:
        return None
    # One rank reads every byte; the others take its word.
    found = run_on_rank_zero(lambda: find_source(path, say))
    source = run_on_all_ranks(lambda: _opened(path, found, run.stages[0].model, say))
    return replace(source, kinds=("fp32",), adam_step=0) if run.objective == "sft" else source


def check_beginning(run: RunConfig, say: Callable[[str], None]) -> None:
    """InputError where `open_beginning` would raise one; by one process alone."""
    if run.init_from is not None:
        _opened(run.init_from, find_source(run.init_from, say), run.stages[0].model, say)


def fill_beginning(
    source: Source | None, layout: Layout, rank: int, storage: Storage, seed: int
) -> int:
    """Writes what a rank holds into its empty storage; returns Adam's step count. Collective."""
    if source is None:
        fill_initial(layout, rank, storage, seed)
        return 0
    run_on_all_ranks(lambda: fill_read(layout, rank, storage, source.kinds, source.read))
    return source.adam_step


def _opened(path: Path, folder: Path, model: ModelConfig, say: Callable[[str], None]) -> Source:
    source = open_found(folder)
    found = source.model.model_dump()
    for key, value in model.model_dump().items():
        if found[key] != value and key not in _FREE:
            raise ConfigError(
                f"init_from = {path}: {key} is {found[key]}, stages.0.model says {value}; make "
                "them equal"
            )
    if still_masked(source):
        raise ConfigError(f"init_from = {path}: {STILL_MASKED}")
    say(f"begins with the weights of {source.path}")
    return source
