"""A shuffle without a table: a pseudorandom permutation of [0, n) that is computed, not stored.

The numbers are laid out on a grid of rows x columns just large enough, and rounds of a Feistel
network mix row and column into each other by modular addition; each round can be undone, so the
whole is a permutation of the grid. Numbers outside of [0, n) are sent through again ("cycle
walking"), which makes it one of [0, n). Black and Rogaway, Ciphers with Arbitrary Finite Domains,
2002.
"""

import math

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 4


def mix(*numbers: int) -> int:
    """A well-spread 64-bit hash of integers (SplitMix64's finaliser, chained)."""
    state = 0
    for number in numbers:
        state = ((state ^ number) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class Permutation:
    """The permutation of [0, size) that belongs to the integers `key`. Python integers only, so
    the same on every platform. `Permutation(n, seed)(i)` is the i-th element."""

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
