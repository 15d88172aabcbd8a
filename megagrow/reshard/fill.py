"""Initialization of values that no other rank provides: random draws, or values read from files.

Each rank produces only its own rows. Element i of a drawn tensor is a pure function of the stream
and of i: a counter-based generator returns any range without drawing the rest. The values are
therefore bit-identical in all layouts.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megagrow.growth.map import Fill, GrowthMap
from megagrow.model.layers.base import DT_RANGE, ZEROS, InitialValues
from megagrow.parallel.sharding import ParamSpec, StateKind, Storage
from megagrow.reshard.copy_ops import ELEMENTS_AT_ONCE, block_view
from megagrow.reshard.index_ranges import overlap
from megagrow.reshard.layout import Block, Layout


def fill_initial(layout: Layout, rank: int, storage: Storage, seed: int) -> None:
    """Write the initial fp32 weights; moments and padding stay zero."""
    for name in storage:
        draw = partial(initial_rows, layout.plan[name], seed)
        _write(layout, rank, storage[name]["fp32"], name, _columns_of(draw))


def fill_new(growth: GrowthMap, layout: Layout, rank: int, storage: Storage) -> None:
    """Write the fills of a growth map into the fp32 weights of an empty engine.

    Call before the exchange, which adds its copies to the filled values. Padding and entries
    without a fill stay zero.
    """
    for name in storage:
        fills = [fill for fill in growth.fills.get(name, ()) if not fill.is_zero]
        if fills:
            draw = partial(drawn_rows, fills, layout.plan[name])
            _write(layout, rank, storage[name]["fp32"], name, _columns_of(draw))


def fill_read(
    layout: Layout,
    rank: int,
    storage: Storage,
    kinds: tuple[StateKind, ...],
    read: Callable[[str, StateKind, Block], Tensor],
) -> None:
    """Write the values returned by `read` for a rank's blocks; padding stays zero.

    `kinds` are the states to write, of the parameters that have them.
    """
    for name, held in storage.items():
        for kind in (kind for kind in kinds if kind in held):
            _write(layout, rank, held[kind], name, partial(read, name, kind))


def _columns_of(draw: Callable[[range], Tensor]) -> Callable[[Block], Tensor]:
    """Adapt a function that draws full rows to draw the columns of a block."""
    return lambda block: draw(block.rows)[:, block.cols.start : block.cols.stop]


def _write(
    layout: Layout, rank: int, stored: Tensor, name: str, make: Callable[[Block], Tensor]
) -> None:
    """Write the values returned by `make` for a rank's blocks of a parameter, in row chunks."""
    rows_at_once = max(1, ELEMENTS_AT_ONCE // layout.plan[name].cols)
    for block in layout.blocks(name, rank):
        for first in range(block.rows.start, block.rows.stop, rows_at_once):
            part = Block(range(first, min(first + rows_at_once, block.rows.stop)), block.cols)
            place = layout.local(name, rank, part)
            block_view(stored, part, *place).copy_(make(part))


_PROJECTED_ROWS = 64
"""Rows projected together. A matrix product may round a row differently depending on the other
rows in the batch, so every rank groups rows at multiples of this number."""


def drawn_rows(fills: Sequence[Fill], spec: ParamSpec, rows: range) -> Tensor:
    """Return the sum of the fills of a parameter: (len(rows), spec.cols) fp64."""
    return torch.stack([_Drawing(fill, spec).rows(rows) for fill in fills]).sum(0)


@dataclass(frozen=True)
class _Drawing:
    """Fill of one parameter."""

    fill: Fill
    spec: ParamSpec

    def rows(self, rows: range) -> Tensor:
        """Return rows of the fill: (len(rows), cols) fp64."""
        new = _mask(self.fill.new_rows, self.spec.rows)[rows.start : rows.stop]
        values = torch.zeros(len(rows), self.spec.cols, dtype=torch.float64)
        if np.any(self.fill.std):
            std = torch.tensor(self.fill.std, dtype=torch.float64)
            across = _mask(self.fill.new_cols, self.spec.cols)
            values = self._normals(rows).mul_(std[new[:, None], across])
        if self.fill.initial != ZEROS:
            drawn = initial_values(self.fill.initial, self.fill.stream, rows, self.spec.cols)
            values += drawn.double() * new[:, None]
        return values

    def _normals(self, rows: range) -> Tensor:
        if self.fill.basis is None:
            return self._centered(rows)
        begin = rows.start - rows.start % _PROJECTED_ROWS
        projected = []
        for first in range(begin, rows.stop, _PROJECTED_ROWS):
            group = range(first, min(first + _PROJECTED_ROWS, self.spec.rows))
            values = self._centered(group)
            basis = torch.from_numpy(self.fill.basis)
            values -= values @ basis @ basis.T
            mine = overlap(group, rows)
            projected.append(values[mine.start - first : mine.stop - first])
        return torch.cat(projected)

    def _centered(self, rows: range) -> Tensor:
        cols = self.spec.cols
        values = normal(self.fill.stream, rows.start * cols, len(rows) * cols)
        values = values.view(-1, cols).double()
        if self.fill.center is None:
            return values
        _, labels, counts = np.unique(self.fill.center, return_inverse=True, return_counts=True)
        groups = torch.from_numpy(labels)
        means = torch.zeros(len(rows), len(counts), dtype=torch.float64)
        means.index_add_(1, groups, values).div_(torch.from_numpy(counts))
        return values.sub_(means[:, groups])


def _mask(mask: np.ndarray | None, size: int) -> Tensor:
    """Return a mask as indices, 0 for old and 1 for new: (size,) int64."""
    if mask is None:
        return torch.zeros(size, dtype=torch.int64)
    return torch.from_numpy(mask).long()


def initial_rows(spec: ParamSpec, seed: int, rows: range) -> Tensor:
    """Return initial rows of a parameter: (len(rows), spec.cols) fp32, on the CPU."""
    return initial_values(spec.initial, f"{seed}/{spec.name}", rows, spec.cols)


def initial_values(initial: InitialValues, stream: str, rows: range, cols: int) -> Tensor:
    """Return rows of initial values: (len(rows), cols) fp32. Draws are those of a named stream."""
    first, count = rows.start * cols, len(rows) * cols
    match initial.distribution:
        case "constant":
            values = torch.full((count,), initial.scale)
        case "normal":
            values = normal(stream, first, count).mul_(initial.scale)
        case "uniform":
            values = _uniform(stream, first, count).mul_(2).sub_(1).mul_(initial.scale).float()
        case "log of column":
            values = torch.arange(1, cols + 1).log().repeat(len(rows))
        case "inverse softplus":
            least, most = (math.log(bound) for bound in DT_RANGE)
            dt = _uniform(stream, first, count).mul_(most - least).add_(least).exp_()
            values = (dt + torch.log(-torch.expm1(-dt))).float()
    return values.view(-1, cols)


def normal(stream: str, first: int, count: int) -> Tensor:
    """Return elements first..first+count of a named stream of standard normals: (count,) fp32."""
    return torch.special.ndtri(_uniform(stream, first, count)).float()


def _uniform(stream: str, first: int, count: int) -> Tensor:
    """Return elements of a named stream of uniform numbers in (0, 1): (count,) fp64.

    Philox (Salmon et al. 2011) with the position in the stream as counter.
    """
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=16).digest(), "little")
    # Philox generates four 64-bit numbers per counter value.
    generator = np.random.Philox(key=key, counter=first // 4)
    # 52 bits plus one half use all 53 bits of fp64: no rounding to 1, whose quantile is infinite.
    bits = generator.random_raw(first % 4 + count)[first % 4 :] >> np.uint64(12)
    return torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)
