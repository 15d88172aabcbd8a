"""New and old entries of a grown model, and their learning rates."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import tokens_between
from megagrow.growth.map import Fresh
from megagrow.parallel.sharding import Storage
from megagrow.reshard.copy_ops import block_view
from megagrow.reshard.layout import Block, Layout
from megagrow.train.schedule import last_growth, new_entries_of, new_entries_rate, rate_at


class UpdateFactors(NamedTuple):
    """Factors on the updates of new and of old entries."""

    new: float = 1.0
    old: float = 1.0


def update_factors(run: RunConfig, stage_index: int, stage_tokens: int) -> UpdateFactors:
    """Return the factors of the step that begins `stage_tokens` tokens into a stage.

    Old entries do not change until `freeze_tokens` after the last growth. If it defines a separate
    learning rate of new entries, their factor is that rate over the rate of the step. Stages
    without growth that continue the schedule continue both.
    """
    grown = last_growth(run, stage_index)
    growth = None if grown is None else run.stages[grown].growth
    if grown is None or growth is None:
        return UpdateFactors()
    done = tokens_between(run, grown, stage_index) + stage_tokens
    old = 0.0 if done < (growth.freeze_tokens or 0) else 1.0
    rate = rate_at(run, stage_index, stage_tokens)
    if new_entries_of(growth) is None or rate == 0:  # no ratio at rate 0
        return UpdateFactors(old=old)
    return UpdateFactors(new_entries_rate(run, stage_index, stage_tokens) / rate, old)


def has_per_entry_lr(growth: GrowthConfig | None) -> bool:
    """Return True if new and old entries are treated differently at any time of the stage."""
    return growth is not None and bool(new_entries_of(growth) or growth.freeze_tokens)


def fresh_masks(
    fresh: Mapping[str, Fresh], layout: Layout, rank: int, storage: Storage
) -> dict[str, Tensor]:
    """Return masks of the new entries that a rank holds, by parameter: (n,) bool.

    A mask has the order and the device of the rank's storage. Parameters without new entries on the
    rank are absent. Padding of the vocabulary is old: it belongs to no logical tensor.
    """
    masks = {}
    for name, kinds in storage.items():
        new = fresh.get(name, Fresh())
        if new.whole or new.rows is not None or new.cols is not None:
            mask = torch.zeros(kinds["fp32"].numel(), dtype=torch.bool)
            for block in layout.blocks(name, rank):
                place = layout.local(name, rank, block)
                block_view(mask, block, *place).copy_(torch.from_numpy(_new_in(new, block)))
            if mask.any():
                masks[name] = mask.to(kinds["fp32"].device)
    return masks


def _new_in(fresh: Fresh, block: Block) -> np.ndarray:
    """Return the mask (rows, cols) of a block: True in new rows and new columns."""
    new = np.full((len(block.rows), len(block.cols)), fresh.whole)
    if fresh.rows is not None:
        new |= fresh.rows[block.rows.start : block.rows.stop, None]
    if fresh.cols is not None:
        new |= fresh.cols[None, block.cols.start : block.cols.stop]
    return new
