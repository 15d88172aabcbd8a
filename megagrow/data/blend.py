"""Assignment of stream slots to corpora, and the shuffle of a corpus's blocks.

Both are computed, without tables of the corpus's size: `Blend` repeats a fixed pattern by weight,
`Permutation` is a keyed Feistel-like permutation.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from megagrow.errors import ConfigError

PERIOD = 9_000
"""Maximum period of the pattern in slots. Eighths, ninths and thousandths are exact; other weights
are exact to 0.02% of the total."""


class Blend:
    """Periodic pattern of slots in which each corpus has its share, spread evenly.

    Every query takes O(log period), independent of the length of the run.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        slots = _shares(weights, PERIOD)
        self._slots = slots // np.gcd.reduce(slots)
        self.period = int(self._slots.sum())
        self._pattern = _spread(self._slots)
        self._positions = [np.flatnonzero(self._pattern == c) for c in range(len(weights))]

    def corpus_of(self, slot: int) -> int:
        """Return the corpus of slot `slot`."""
        return int(self._pattern[slot % self.period])

    def count(self, corpus: int, slot: int) -> int:
        """Return the number of slots before `slot` that belong to the corpus."""
        periods, rest = divmod(slot, self.period)
        return periods * int(self._slots[corpus]) + bisect_left(self._positions[corpus], rest)

    def slot_of(self, corpus: int, turn: int) -> int:
        """Return the slot of the corpus's `turn`-th turn, counted from 0."""
        periods, rest = divmod(turn, int(self._slots[corpus]))
        return periods * self.period + int(self._positions[corpus][rest])


def _shares(weights: Sequence[float], period: int) -> np.ndarray:
    """Return the slots per period of each corpus, int64: largest remainder, at least one."""
    if len(weights) > period:
        raise ConfigError(f"{len(weights)} corpora are too many to blend; at most {period}")
    # One slot each, and the remaining slots in proportion to the remaining weights.
    ideal = np.asarray(weights, dtype=np.float64) / np.sum(weights) * period
    wanted = np.maximum(ideal - 1, 0)
    wanted *= (period - len(weights)) / max(np.sum(wanted), 1)
    slots: np.ndarray = 1 + np.floor(wanted).astype(np.int64)
    most_cut = np.argsort(np.floor(wanted) - wanted, kind="stable")
    slots[most_cut[: period - int(slots.sum())]] += 1
    return slots


def _spread(slots: np.ndarray) -> np.ndarray:
    """Return the pattern [period]: each slot goes to the corpus furthest behind its share."""
    period = int(slots.sum())
    pattern = np.empty(period, dtype=np.int32)
    behind = np.zeros_like(slots)
    for slot in range(period):
        behind += slots
        pattern[slot] = np.argmax(behind)
        behind[pattern[slot]] -= period
    return pattern


_MASK = (1 << 64) - 1


_GOLDEN = 0x9E3779B97F4A7C15


_ROUNDS = 4


def mix(*numbers: int) -> int:
    """Return a 64-bit hash of integers (SplitMix64's finalizer, chained)."""
    state = 0
    for number in numbers:
        state = ((state ^ number) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class Permutation:
    """Permutation of [0, size) determined by the integers `key`; `Permutation(n, seed)(i)` is its
    i-th element.

    Uses Python integers only, so it is identical on every platform.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._columns = math.isqrt(max(size - 1, 0)) + 1
        self._rows = -(-size // self._columns)
        root = mix(*key)
        self._keys = [(mix(root, 2 * i), mix(root, 2 * i + 1)) for i in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in [0, {self.size})")
        while True:
            row, column = divmod(index, self._columns)
            for row_key, column_key in self._keys:
                row = (row + mix(row_key, column)) % self._rows
                column = (column + mix(column_key, row)) % self._columns
            index = row * self._columns + column
            if index < self.size:
                return index
