"""The numbers of a growth map that come from no source, for any rows of a parameter. Pure.

Every number depends on its stream and its place in the logical tensor alone, so that all layouts,
and growths live and file to file, hold the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megagrow.growth.map import Fill
from megagrow.parallel.initialize import normal
from megagrow.parallel.sharding import ParamSpec
from megagrow.reshard.index_ranges import overlap

_PROJECTED_ROWS = 64
"""Rows that are projected together. A matrix product may round a row differently beside other
rows, so rows keep the same company on every rank: that of their multiple of this number."""


def drawn_rows(fills: Sequence[Fill], spec: ParamSpec, rows: range) -> Tensor:
    """The sum of some fills of a parameter: (len(rows), spec.cols) fp64."""
    return torch.stack([_Drawing(fill, spec).rows(rows) for fill in fills]).sum(0)


@dataclass(frozen=True)
class _Drawing:
    """A fill of one parameter."""

    fill: Fill
    spec: ParamSpec

    def rows(self, rows: range) -> Tensor:
        """Some rows of the fill: (len(rows), cols) fp64."""
        new = _mask(self.fill.new_rows, self.spec.rows)[rows.start : rows.stop]
        values = torch.zeros(len(rows), self.spec.cols, dtype=torch.float64)
        if np.any(self.fill.std):
            std = torch.tensor(self.fill.std, dtype=torch.float64)
            across = _mask(self.fill.new_cols, self.spec.cols)
            values = self._normals(rows).mul_(std[new[:, None], across])
        return values.add_(self.fill.constant * new[:, None])

    def _normals(self, rows: range) -> Tensor:
        if self.fill.basis is None:
            return self._centred(rows)
        begin = rows.start - rows.start % _PROJECTED_ROWS
        found = []
        for first in range(begin, rows.stop, _PROJECTED_ROWS):
            together = range(first, min(first + _PROJECTED_ROWS, self.spec.rows))
            values = self._centred(together)
            basis = torch.from_numpy(self.fill.basis)
            values -= values @ basis @ basis.T
            mine = overlap(together, rows)
            found.append(values[mine.start - first : mine.stop - first])
        return torch.cat(found)

    def _centred(self, rows: range) -> Tensor:
        cols = self.spec.cols
        values = normal(self.fill.stream, rows.start * cols, len(rows) * cols)
        values = values.view(-1, cols).double()
        if self.fill.centre is None:
            return values
        _, labels, counts = np.unique(self.fill.centre, return_inverse=True, return_counts=True)
        groups = torch.from_numpy(labels)
        means = torch.zeros(len(rows), len(counts), dtype=torch.float64)
        means.index_add_(1, groups, values).div_(torch.from_numpy(counts))
        return values.sub_(means[:, groups])


def _mask(mask: np.ndarray | None, size: int) -> Tensor:
    """A mask as indices, 0 for old and 1 for new: (size,) int64."""
    if mask is None:
        return torch.zeros(size, dtype=torch.int64)
    return torch.from_numpy(mask).long()
