"""Initial state of a run: newly initialized weights, or those of an existing model.

`init_from` is a checkpoint, a run (its newest checkpoint), or a Hugging Face folder. Moments and
Adam's step count are loaded with the weights if the source has them, except for instruction tuning,
whose loss differs. Token count, schedule and data position restart at 0.
"""

import logging
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megagrow.checkpoint.source import Source
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.errors import ConfigError
from megagrow.formats.open_source import (
    find_source,
    find_source_on_all_ranks,
    log_warnings,
    open_found,
)
from megagrow.growth.map import identity_map, kept_state
from megagrow.parallel.agreement import run_on_all_ranks, run_on_rank_zero
from megagrow.parallel.optimizers.rules import source_kind
from megagrow.parallel.sharding import StateKind, Storage
from megagrow.reshard.fill import fill_initial, fill_read
from megagrow.reshard.layout import Block, Layout
from megagrow.train.source_state import STILL_MASKED, still_masked

logger = logging.getLogger(__name__)

_FREE = ("initializer_range", "max_position_embeddings")
"""Model fields that do not affect the weights."""


def open_beginning(run: RunConfig) -> Source | None:
    """Open the source named by `init_from`; None without one. Collective.

    Raises CheckpointError if it is missing or damaged, ConfigError if it is not the model of the
    first stage.
    """
    path = run.init_from
    if path is None:
        return None
    folder = find_source_on_all_ranks(path)
    source = run_on_all_ranks(lambda: _opened(path, folder, run.stages[0].model))
    run_on_rank_zero(lambda: log_warnings(source))
    logger.info("weights initialized from %s", source.path)
    return replace(source, kinds=("fp32",), adam_step=0) if run.objective == "sft" else source


def check_beginning(run: RunConfig) -> Source | None:
    """Open the source named by `init_from` in a single process, with the errors of
    `open_beginning`."""
    if run.init_from is None:
        return None
    source = _opened(run.init_from, find_source(run.init_from), run.stages[0].model)
    log_warnings(source)
    return source


def fill_beginning(
    source: Source | None, layout: Layout, rank: int, storage: Storage, seed: int
) -> int:
    """Fill a rank's empty storage and return Adam's step count. Collective."""
    if source is None:
        fill_initial(layout, rank, storage, seed)
        return 0
    kept = kept_state(identity_map(list(layout.plan)), source.layout.plan, layout.plan)

    kinds = tuple(kind for kind in kept.kinds if source_kind(kind, source.kinds))

    def read(name: str, kind: StateKind, block: Block) -> Tensor:
        found = source_kind(kind, source.kinds_of(name))
        assert found is not None
        return source.read(name, found, block)

    run_on_all_ranks(lambda: fill_read(layout, rank, storage, kinds, read))
    return source.adam_step if kept.keeps_step else 0


def _opened(path: Path, folder: Path, model: ModelConfig) -> Source:
    source = open_found(folder)
    found = source.model.model_dump()
    for key, value in model.model_dump().items():
        if found[key] != value and key not in _FREE:
            raise ConfigError(
                f"init_from = {path}: {key} is {found[key]}, but {value} in stages.0.model; make "
                "them equal"
            )
    if still_masked(source):
        raise ConfigError(f"init_from = {path}: {STILL_MASKED}")
    return source
