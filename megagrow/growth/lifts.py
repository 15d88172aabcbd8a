"""Lifts: growth of one activation axis, and of every tensor axis tied to it.

An activation axis is a vector that flows through the model (residual stream, heads, feed-forward).
A lift is a matrix P with at most one entry in each row: x'[i] = produce[i] * x[index[i]], and its
left inverse, which the consumers of the axis apply: P+ [index[i], i] = share[i] / produce[i]. The
shares of all copies of an entry add up to 1.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Lift:
    """Growth of an axis from `size` to len(index) entries.

    `index` is int64, -1 for entries without a source; `share` and `produce` are fp64.
    """

    size: int
    index: np.ndarray
    share: np.ndarray
    produce: np.ndarray
    random_out: bool = False
    """True if weights that produce entries without a source are random; otherwise they are zero."""
    random_in: bool = False
    """Same for weights that consume entries without a source."""
    lawful: bool = True
    """True if gradients scale with the lift; otherwise moments are copied unscaled."""

    @property
    def grown_size(self) -> int:
        return len(self.index)

    @cached_property
    def unchanged(self) -> bool:
        """Return True if the axis does not grow."""
        same = np.array_equal(self.index, np.arange(self.size))
        return bool(same and (self.share == 1).all() and (self.produce == 1).all())

    @cached_property
    def new(self) -> np.ndarray:
        """Return a mask of the entries without a source."""
        return self.index < 0

    @cached_property
    def occurrence(self) -> np.ndarray:
        """Return for each entry the number of earlier copies; 0 for entries without a source."""
        count = np.zeros(self.grown_size, np.int64)
        seen: dict[int, int] = {}
        for position, origin in enumerate(self.index.tolist()):
            if origin >= 0:
                count[position] = seen.get(origin, 0)
                seen[origin] = count[position] + 1
        return count

    @cached_property
    def fresh(self) -> np.ndarray:
        """Return a mask of the new entries: without a source, or copies after the first."""
        return self.new | (self.occurrence > 0)

    @cached_property
    def copies(self) -> np.ndarray:
        """Return the number of copies of each source entry: (size,)."""
        return np.bincount(self.index[~self.new], minlength=self.size)

    @property
    def factor(self) -> int | None:
        """Return the number of evenly shared copies of every entry; None if it is not uniform."""
        count = self.grown_size // self.size
        even = bool((self.copies == count).all()) and not self.new.any()
        plain = bool(np.allclose(self.share, 1 / count) and (self.produce == 1).all())
        return count if even and plain else None


def unchanged(size: int) -> Lift:
    """Return the lift that does not change the axis."""
    ones = np.ones(size)
    return Lift(size, np.arange(size), ones, ones)


def copied(size: int, grown: int, order: str = "interleaved") -> Lift:
    """Return a lift that repeats every entry as evenly as the sizes allow, with equal shares.

    `interleaved` places copies next to each other, so tensor-parallel slices grow in place
    (docs/reference/operators.md); `tiled` repeats the complete axis.
    """
    positions = np.arange(grown)
    index = positions * size // grown if order == "interleaved" else positions % size
    return evenly(size, index)


def drawn(size: int, grown: int, generator: np.random.Generator) -> Lift:
    """Return Net2Net's lift: the axis, then random picks of its entries, balanced if they fit."""
    complete = [generator.permutation(size) for _ in range(grown // size - 1)]
    rest = generator.integers(size, size=grown % size)
    return evenly(size, np.concatenate([np.arange(size), *complete, rest]))


def evenly(size: int, index: np.ndarray) -> Lift:
    """Return the lift of an index list; copies of an entry have equal shares."""
    counts = np.bincount(index[index >= 0], minlength=size)
    share = np.where(index < 0, 0.0, 1.0 / np.maximum(counts, 1)[index])
    return Lift(size, index.astype(np.int64), share, np.ones(len(index)))


def unevenly(lift: Lift, generator: np.random.Generator) -> Lift:
    """Return the same copies with random shares, which add up to 1 for every entry."""
    weight = np.where(lift.new, 0.0, generator.uniform(0.5, 1.5, lift.grown_size))
    total = np.bincount(lift.index[~lift.new], weight[~lift.new], minlength=lift.size)
    return replace(lift, share=np.where(lift.new, 0.0, weight / total[lift.index]))


def padded(size: int, grown: int, random_out: bool, random_in: bool) -> Lift:
    """Return the axis followed by entries without a source."""
    index = np.concatenate([np.arange(size), np.full(grown - size, -1)])
    share = np.where(index < 0, 0.0, 1.0)
    return Lift(size, index, share, np.ones(grown), random_out, random_in)


def copied_then_padded(size: int, grown: int) -> Lift:
    """Return as many complete copies as fit, then zero entries with random consumers.

    This is LEMON's fan-out with the zero residue that RMSNorm needs (docs/reference/operators.md).
    """
    complete = grown - grown % size
    index = np.concatenate([np.arange(complete) % size, np.full(grown % size, -1)])
    return replace(evenly(size, index), random_in=True)


def product(outer: Lift, inner: Lift) -> Lift:
    """Return the lift of an axis that is a row-major table of outer.size by inner.size entries."""
    rows, cols = np.repeat(outer.index, inner.grown_size), np.tile(inner.index, outer.grown_size)
    index = np.where((rows < 0) | (cols < 0), -1, rows * inner.size + cols)
    grown_parts = [lift for lift in (outer, inner) if lift.new.any()]
    return Lift(
        outer.size * inner.size,
        index,
        np.where(index < 0, 0.0, np.outer(outer.share, inner.share).ravel()),
        np.outer(outer.produce, inner.produce).ravel(),
        bool(grown_parts) and all(lift.random_out for lift in grown_parts),
        bool(grown_parts) and all(lift.random_in for lift in grown_parts),
        outer.lawful and inner.lawful,
    )
