"""Lifts: how one wire of the model grows, and with it every tensor axis that is tied to it.

A wire is a vector that flows through the model (residual stream, heads, feed-forward). A lift is a
matrix P with at most one entry in each row: x'[i] = produce[i] * x[index[i]], and a left inverse
of it, which the wire's consumers apply: P+ [index[i], i] = share[i] / produce[i], where the shares
of all copies of an entry add up to 1.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Lift:
    """How a wire of `size` entries becomes one of len(index).

    `index` is int64 with -1 for entries that come from nothing; `share` and `produce` are fp64.
    """

    size: int
    index: np.ndarray
    share: np.ndarray
    produce: np.ndarray
    random_out: bool = False
    """Whether weights that produce entries from nothing are drawn at random, or are zero."""
    random_in: bool = False
    """The same of weights that consume entries from nothing."""
    lawful: bool = True
    """Whether gradients scale by the law of the lift; if not, moments move unscaled."""

    @property
    def grown_size(self) -> int:
        return len(self.index)

    @cached_property
    def unchanged(self) -> bool:
        """Whether nothing grows here."""
        same = np.array_equal(self.index, np.arange(self.size))
        return bool(same and (self.share == 1).all() and (self.produce == 1).all())

    @cached_property
    def new(self) -> np.ndarray:
        """Which entries come from nothing."""
        return self.index < 0

    @cached_property
    def occurrence(self) -> np.ndarray:
        """Of each entry how many copies of the same came before it; 0 for entries from nothing."""
        count = np.zeros(self.grown_size, np.int64)
        seen: dict[int, int] = {}
        for position, origin in enumerate(self.index.tolist()):
            if origin >= 0:
                count[position] = seen.get(origin, 0)
                seen[origin] = count[position] + 1
        return count

    @cached_property
    def fresh(self) -> np.ndarray:
        """Which entries are new: from nothing, or copies after the first."""
        return self.new | (self.occurrence > 0)

    @cached_property
    def copies(self) -> np.ndarray:
        """How often each source entry occurs: (size,)."""
        return np.bincount(self.index[~self.new], minlength=self.size)

    @property
    def factor(self) -> int | None:
        """How many copies there are of every entry, evenly shared; None if that is not so."""
        count = self.grown_size // self.size
        even = bool((self.copies == count).all()) and not self.new.any()
        plain = bool(np.allclose(self.share, 1 / count) and (self.produce == 1).all())
        return count if even and plain else None


def unchanged(size: int) -> Lift:
    """The wire as it is."""
    ones = np.ones(size)
    return Lift(size, np.arange(size), ones, ones)


def copied(size: int, grown: int, order: str = "interleaved") -> Lift:
    """Every entry is repeated, as evenly as the sizes allow, and shared out evenly.

    `interleaved` puts copies side by side, so that tensor-parallel slices grow in place
    (docs/reference/operators.md); `tiled` repeats the wire as a whole.
    """
    positions = np.arange(grown)
    index = positions * size // grown if order == "interleaved" else positions % size
    return evenly(size, index)


def drawn(size: int, grown: int, generator: np.random.Generator) -> Lift:
    """Net2Net: the wire, then random picks of its entries; all equally often where that fits."""
    whole = [generator.permutation(size) for _ in range(grown // size - 1)]
    rest = generator.integers(size, size=grown % size)
    return evenly(size, np.concatenate([np.arange(size), *whole, rest]))


def evenly(size: int, index: np.ndarray) -> Lift:
    """A lift by any index list; copies of an entry have equal shares."""
    counts = np.bincount(index[index >= 0], minlength=size)
    share = np.where(index < 0, 0.0, 1.0 / np.maximum(counts, 1)[index])
    return Lift(size, index.astype(np.int64), share, np.ones(len(index)))


def unevenly(lift: Lift, generator: np.random.Generator) -> Lift:
    """The same copies with random shares, which still add up to 1 for every entry."""
    weight = np.where(lift.new, 0.0, generator.uniform(0.5, 1.5, lift.grown_size))
    total = np.bincount(lift.index[~lift.new], weight[~lift.new], minlength=lift.size)
    return replace(lift, share=np.where(lift.new, 0.0, weight / total[lift.index]))


def padded(size: int, grown: int, random_out: bool, random_in: bool) -> Lift:
    """The wire, and behind it entries from nothing."""
    index = np.concatenate([np.arange(size), np.full(grown - size, -1)])
    share = np.where(index < 0, 0.0, 1.0)
    return Lift(size, index, share, np.ones(grown), random_out, random_in)


def copied_then_padded(size: int, grown: int) -> Lift:
    """As many whole copies as fit, then entries that stay zero and are consumed at random
    (LEMON's fan-out with a zero residue, which RMSNorm needs: docs/reference/operators.md)."""
    whole = grown - grown % size
    index = np.concatenate([np.arange(whole) % size, np.full(grown % size, -1)])
    return replace(evenly(size, index), random_in=True)


def product(outer: Lift, inner: Lift) -> Lift:
    """The lift of a wire that is a table of outer.size rows by inner.size columns, by rows."""
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
