"""What a growth map's terms and fills come to, for any rectangle of a target parameter.

Pure: `read(name, kind, block)` gives rectangles of the source, (rows, columns) fp32. No more than
`at_once` elements are asked for at a time, or one row, or as many whole rows as are to be made.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megagrow.growth.map import Axis, Dense, Fill, Gather, GrowthMap, Indices, Kind
from megagrow.parallel.initialize import normal
from megagrow.parallel.plan import ParamSpec
from megagrow.reshard.layout import Block

Read = Callable[[str, Kind, Block], Tensor]

_IN_CACHE = 2**18
"""Elements that are picked, scaled or drawn at once."""

_BRIDGED = 2**14
"""Unwanted elements that are read in one go with those on both sides of them."""

_PROJECTED_ROWS = 64
"""Rows that are projected together: always those of one multiple of this number, since a matrix
product may round a row differently beside other rows."""


@dataclass(frozen=True, eq=False)
class Application:
    """A growth map applied to a source."""

    read: Read
    source: dict[str, ParamSpec]
    growth: GrowthMap
    target: dict[str, ParamSpec]
    at_once: int

    def block(self, name: str, kind: Kind, block: Block) -> Tensor:
        """A rectangle of a target parameter: (rows, columns) fp32."""
        adds = kind == "fp32" and self.growth.adds(name)
        if adds:
            values = _filled(self.growth.fills[name], self.target[name], block)
        else:
            values = torch.zeros(len(block.rows), len(block.cols))
        for term in self.growth.terms(name, kind):
            if isinstance(term, Dense):
                values += self._mixed(term, kind, block).float()
            else:
                self._gather(term, kind, block, values, adds)
        return values

    def _gather(self, term: Gather, kind: Kind, block: Block, values: Tensor, adds: bool) -> None:
        rows, cols = _listed(term.rows.source(block.rows)), _listed(term.cols.source(block.cols))
        to_cols = np.flatnonzero(cols >= 0)
        if not len(to_cols):
            return
        across = range(int(cols[to_cols].min()), int(cols[to_cols].max()) + 1)
        for span in _spans(rows, len(across), self.at_once):
            read = self.read(term.source, kind, Block(span, across))
            to_rows = np.flatnonzero((rows >= span.start) & (rows < span.stop))
            for some in _cut(to_rows, len(to_cols)):
                part = read[_index(rows[some] - span.start)]
                part = part[:, _index(cols[to_cols] - across.start)]
                part = _scaled(part, term.rows, some + block.rows.start, (-1, 1))
                part = _scaled(part, term.cols, to_cols + block.cols.start, (1, -1))
                _put(values, some, to_cols, part, adds)

    def _mixed(self, term: Dense, kind: Kind, block: Block) -> Tensor:
        """left @ (sum of alpha * source * gain) @ right^T, for a rectangle of it: fp64."""
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

    def _sum(self, term: Dense, kind: Kind, block: Block) -> Tensor:
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
    """The sum of all fills in a rectangle."""
    values = torch.empty(len(block.rows), len(block.cols))
    drawn = [fill for fill in fills if not fill.is_zero]
    step = max(1, _IN_CACHE // spec.cols)
    for first in range(block.rows.start, block.rows.stop, step):
        rows = range(first, min(first + step, block.rows.stop))
        total = torch.stack([_drawn(fill, spec, rows) for fill in drawn]).sum(0)
        inside = slice(rows.start - block.rows.start, rows.stop - block.rows.start)
        values[inside].copy_(total[:, block.cols.start : block.cols.stop])
    return values


def _drawn(fill: Fill, spec: ParamSpec, rows: range) -> Tensor:
    """Whole rows of one fill: fp64."""
    new = _mask(fill.new_rows, spec.rows)[rows.start : rows.stop]
    values = torch.zeros(len(rows), spec.cols, dtype=torch.float64)
    if np.any(fill.std):
        std = torch.tensor(fill.std, dtype=torch.float64)
        values = _normals(fill, spec, rows).mul_(std[new[:, None], _mask(fill.new_cols, spec.cols)])
    return values.add_(fill.constant * new[:, None])


def _normals(fill: Fill, spec: ParamSpec, rows: range) -> Tensor:
    if fill.basis is None:
        return _centred(fill, spec.cols, rows)
    basis, found = torch.from_numpy(fill.basis), []
    for first in range(rows.start - rows.start % _PROJECTED_ROWS, rows.stop, _PROJECTED_ROWS):
        together = range(first, min(first + _PROJECTED_ROWS, spec.rows))
        values = _centred(fill, spec.cols, together)
        values -= values @ basis @ basis.T
        begin, stop = max(first, rows.start), min(together.stop, rows.stop)
        found.append(values[begin - first : stop - first])
    return torch.cat(found)


def _centred(fill: Fill, cols: int, rows: range) -> Tensor:
    values = normal(fill.stream, rows.start * cols, len(rows) * cols).view(-1, cols).double()
    if fill.centre is None:
        return values
    _, labels, counts = np.unique(fill.centre, return_inverse=True, return_counts=True)
    groups = torch.from_numpy(labels)
    means = torch.zeros(len(rows), len(counts), dtype=torch.float64)
    means.index_add_(1, groups, values).div_(torch.from_numpy(counts))
    return values.sub_(means[:, groups])


def _mask(mask: np.ndarray | None, size: int) -> Tensor:
    """0 for old and 1 for new: (size,) int64."""
    if mask is None:
        return torch.zeros(size, dtype=torch.int64)
    return torch.from_numpy(mask).long()


def _listed(positions: Indices) -> np.ndarray:
    if isinstance(positions, range):
        return np.arange(positions.start, positions.stop)
    return positions


def _spans(rows: np.ndarray, width: int, at_once: int) -> Iterator[range]:
    """Ranges of rows that hold all those wanted, few that are not, and `at_once` elements."""
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
    """A slice where the positions are consecutive."""
    if (np.diff(positions) == 1).all():
        return slice(int(positions[0]), int(positions[0]) + len(positions))
    return torch.from_numpy(positions)


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
