"""Examples put into rows of one length, none of them cut in two."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], row: int) -> list[list[int]]:
    """Which items stand in which row, in the order of their numbers: best fit, the fullest row
    that still has room. No length is above `row`."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (what is free in a row, its number), ascending
    for item, length in enumerate(lengths):
        place = bisect_left(rooms, (length, 0))
        free, number = rooms.pop(place) if place < len(rooms) else (row, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(item)
        if free > length:
            insort(rooms, (free - length, number))
    return rows
