"""Evaluation of a growth map for any rectangle of a target parameter. Pure.

`read(name, kind, block)` returns rectangles of the source, (rows, columns) fp32. A read requests at
most `at_once` elements, or one row, or the number of full rows being produced.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from megagrow.growth.map import Axis, Dense, Fill, Gather, GrowthMap, Term
from megagrow.parallel.optimizers.rules import source_kind
from megagrow.parallel.sharding import ParamSpec, StateKind
from megagrow.reshard.fill import drawn_rows
from megagrow.reshard.index_ranges import as_array, bounds, compact
from megagrow.reshard.layout import Block

Read = Callable[[str, StateKind, Block], Tensor]

_IN_CACHE = 2**18
"""Elements indexed, scaled or drawn per step; few enough to stay in cache."""

_BRIDGED = 2**14
"""Maximum gap in elements between wanted elements that are read in one request, gap included."""


@dataclass(frozen=True, eq=False)
class Application:
    """Growth map bound to a source."""

    read: Read
    source: dict[str, ParamSpec]
    growth: GrowthMap
    target: dict[str, ParamSpec]
    at_once: int

    def block(self, name: str, kind: StateKind, block: Block) -> Tensor:
        """Return a rectangle of a target parameter: (rows, columns) fp32."""
        adds = kind == "fp32" and self.growth.adds(name)
        if adds:
            values = _filled(self.growth.fills[name], self.target[name], block)
        else:
            values = torch.zeros(len(block.rows), len(block.cols))
        for term in self._terms(name, kind):
            read = source_kind(kind, self.source[term.sources[0]].kinds)
            if read is None:
                continue
            if isinstance(term, Dense):
                values += self._mixed(term, read, block).float()
            else:
                self._gather(term, read, block, values, adds)
        return values

    @cached_property
    def _terms(self) -> Callable[[str, StateKind], tuple[Term, ...]]:
        """Terms of the current parameter, cached so that matrices are squared once."""
        return lru_cache(maxsize=1)(self.growth.terms)

    def _gather(
        self, term: Gather, kind: StateKind, block: Block, values: Tensor, adds: bool
    ) -> None:
        rows, cols = as_array(term.rows.source(block.rows)), as_array(term.cols.source(block.cols))
        to_cols = np.flatnonzero(cols >= 0)
        if not len(to_cols):
            return
        across = bounds(cols)
        for span in _spans(rows, len(across), self.at_once):
            read = self.read(term.source, kind, Block(span, across))
            to_rows = np.flatnonzero((rows >= span.start) & (rows < span.stop))
            for some in _cut(to_rows, len(to_cols)):
                part = read[_index(rows[some] - span.start)]
                part = part[:, _index(cols[to_cols] - across.start)]
                part = _scaled(part, term.rows, some + block.rows.start, (-1, 1))
                part = _scaled(part, term.cols, to_cols + block.cols.start, (1, -1))
                _put(values, some, to_cols, part, adds)

    def _mixed(self, term: Dense, kind: StateKind, block: Block) -> Tensor:
        """Return a rectangle of left @ (sum of alpha * source * gain) @ right^T: fp64."""
        left = None if term.left is None else torch.from_numpy(term.left)
        right = None if term.right is None else torch.from_numpy(term.right)
        size = self.source[term.sources[0]]
        across = range(size.cols) if right is not None else block.cols
        gain = self._gain(term, across)
        if left is None:
            mixed = self._sum(term, kind, Block(block.rows, across)) * gain
        else:
            mixed = torch.zeros(len(block.rows), len(across), dtype=torch.float64)
            step = max(1, self.at_once // len(across))
            for first in range(0, size.rows, step):
                some = range(first, min(first + step, size.rows))
                factor = left[block.rows.start : block.rows.stop, some.start : some.stop]
                mixed += factor @ (self._sum(term, kind, Block(some, across)) * gain)
        return mixed if right is None else mixed @ right[block.cols.start : block.cols.stop].T

    def _sum(self, term: Dense, kind: StateKind, block: Block) -> Tensor:
        total = torch.zeros(len(block.rows), len(block.cols), dtype=torch.float64)
        for alpha, name in zip(term.alphas, term.sources, strict=True):
            total.add_(self.read(name, kind, block), alpha=alpha)
        return total

    def _gain(self, term: Dense, across: range) -> Tensor:
        if term.gain is None:
            return torch.ones((), dtype=torch.float64)
        gain = self.read(term.gain, "fp32", Block(across, range(1))).ravel().double()
        return torch.where(gain == 0, 0.0, gain**term.gain_power)


def _filled(fills: Iterable[Fill], spec: ParamSpec, block: Block) -> Tensor:
    """Return the sum of all fills in a rectangle."""
    values = torch.empty(len(block.rows), len(block.cols))
    drawn = [fill for fill in fills if not fill.is_zero]
    step = max(1, _IN_CACHE // spec.cols)
    for first in range(block.rows.start, block.rows.stop, step):
        rows = range(first, min(first + step, block.rows.stop))
        total = drawn_rows(drawn, spec, rows)
        inside = slice(rows.start - block.rows.start, rows.stop - block.rows.start)
        values[inside].copy_(total[:, block.cols.start : block.cols.stop])
    return values


def _spans(rows: np.ndarray, width: int, at_once: int) -> Iterator[range]:
    """Cover the wanted rows with ranges of at most `at_once` elements and small gaps."""
    wanted = np.unique(rows[rows >= 0])
    if not len(wanted):
        return
    most, gap = max(1, at_once // width), max(1, _BRIDGED // width)
    for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > gap) + 1):
        first = 0
        while first < len(run):
            stop = int(np.searchsorted(run, run[first] + most))
            yield range(int(run[first]), int(run[stop - 1]) + 1)
            first = stop


def _cut(positions: np.ndarray, width: int) -> Iterator[np.ndarray]:
    step = max(1, _IN_CACHE // width)
    return (positions[first : first + step] for first in range(0, len(positions), step))


def _index(positions: np.ndarray) -> slice | Tensor:
    """Return a slice if the positions are consecutive, else an index tensor."""
    compacted = compact(positions)
    if isinstance(compacted, range):
        return slice(compacted.start, compacted.stop)
    return torch.from_numpy(compacted)


def _scaled(values: Tensor, axis: Axis, at: np.ndarray, shape: tuple[int, int]) -> Tensor:
    if axis.scale is None:
        return values
    return values * values.new_tensor(axis.scale[at]).view(shape)


def _put(values: Tensor, rows: np.ndarray, cols: np.ndarray, part: Tensor, adds: bool) -> None:
    at_rows, at_cols = _index(rows), _index(cols)
    if isinstance(at_rows, slice) and isinstance(at_cols, slice):
        view = values[at_rows, at_cols]
        view.add_(part) if adds else view.copy_(part)
    else:
        places = torch.from_numpy(rows)[:, None], torch.from_numpy(cols)
        values.index_put_(places, part, accumulate=adds)
