"""Positions along one axis: a `range` if they are consecutive, else an int64 array.

Ranges keep plans small and make copies plain views, so every function returns a range if possible.
"""

import numpy as np

from megagrow.growth.map import Indices


def shift(span: range, by: int) -> range:
    """Return a range shifted by a distance."""
    return range(span.start + by, span.stop + by)


def overlap(a: range, b: range) -> range:
    """Return the intersection of two ranges, empty if disjoint."""
    start = max(a.start, b.start)
    return range(start, max(start, min(a.stop, b.stop)))


def compact(positions: np.ndarray) -> Indices:
    """Return the positions as a range if they are consecutive."""
    count = len(positions)
    if count == 0:
        return range(0)
    first = int(positions[0])
    if int(positions[-1]) - first != count - 1 or (np.diff(positions) != 1).any():
        return positions
    return range(first, first + count)


def as_array(positions: Indices) -> np.ndarray:
    """Return the positions as an int64 array."""
    if isinstance(positions, range):
        return np.arange(positions.start, positions.stop)
    return positions


def bounds(positions: Indices) -> range:
    """Return the smallest range that covers the positions; -1 entries are ignored."""
    if isinstance(positions, range):
        return positions
    real = positions[positions >= 0]
    return range(int(real.min()), int(real.max()) + 1) if len(real) else range(0)


def pick(positions: Indices, places: Indices) -> Indices:
    """Return the elements of `positions` at the indices `places`."""
    if isinstance(positions, range):
        if isinstance(places, range):
            return positions[places.start : places.stop]
        return compact(places + positions.start)
    inside = slice(places.start, places.stop) if isinstance(places, range) else places
    return compact(positions[inside])


def moved(positions: Indices, by: int) -> Indices:
    """Return all positions shifted by a distance."""
    if isinstance(positions, range):
        return shift(positions, by)
    return positions + by if by else positions


def select(wanted: Indices, held: Indices) -> tuple[Indices, Indices]:
    """Intersect wanted and held positions: return their indices in `held` and in `wanted`.

    `wanted` may be unordered, repeat positions and contain -1 (no source); `held` is ascending.
    """
    if isinstance(held, range):
        if isinstance(wanted, range):
            shared = overlap(wanted, held)
            return shift(shared, -held.start), shift(shared, -wanted.start)
        places = compact(np.flatnonzero((wanted >= held.start) & (wanted < held.stop)))
        return moved(pick(wanted, places), -held.start), places
    if wanted is held:
        return range(len(held)), range(len(held))
    listed = as_array(wanted)
    at = np.minimum(np.searchsorted(held, listed), len(held) - 1)
    places = compact(np.flatnonzero(held[at] == listed))
    return pick(compact(at), places), places


def distinct(positions: Indices) -> Indices:
    """Return the unique positions in ascending order."""
    return positions if isinstance(positions, range) else compact(np.unique(positions))


def common(a: Indices, b: Indices) -> Indices:
    """Return the intersection of two ascending lists."""
    return pick(a, select(a, b)[1])


def without(a: Indices, b: Indices) -> Indices:
    """Return the positions of an ascending list that are not in another."""
    shared = select(a, b)[1]
    if len(shared) in (0, len(a)):
        return range(0) if len(shared) else a
    return compact(np.delete(as_array(a), as_array(shared)))
