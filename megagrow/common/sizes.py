"""Counts, byte sizes and durations as readable text, such as `2M`, `1.5 GiB`, `1h06m`."""

import re
from decimal import Decimal

COUNT_UNITS = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}
BYTE_UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
BYTE_UNITS |= {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
_COUNT = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*([KMBT]?)", re.IGNORECASE)
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?", re.IGNORECASE)
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_EXAMPLES = "such as 2048, 2M or 1.5B"

LARGEST_COUNT = 10**27
"""Maximum of `parse_count`, above any FLOP budget. Decimal is exact up to here (28 digits), and the
product of two counts fits into a float."""


LARGEST_BYTES = 10**18
"""Maximum of `parse_bytes`."""


def parse_count(value: object) -> int:
    """Return the integer that a number or a text such as `1.5B` specifies.

    Args:
        value: an int, an integral float, or text: digits with optional `_` between them, a
            fraction, an exponent and one of the suffixes K (1e3), M (1e6), B (1e9), T (1e12), in
            either case.

    Raises:
        ValueError: anything else, including negative and non-integral numbers.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"should be a whole number {_EXAMPLES}")
    match = _COUNT.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(f"should be a whole number of 0 or more, {_EXAMPLES}")
    digits, suffix = match.groups()
    count = Decimal(digits.replace("_", "")) * COUNT_UNITS.get(suffix.upper(), 1)
    if count > LARGEST_COUNT:
        raise ValueError(f"is more than {LARGEST_COUNT:.0e}")
    if count % 1:
        raise ValueError(f"is {count.normalize():f}, which is not a whole number")
    return int(count)


def format_count(count: int) -> str:
    """Return `count` with the largest suffix that needs at most two decimals, else plain digits.

    Exact: `parse_count` returns the same number.
    """
    for suffix, unit in COUNT_UNITS.items():
        if count >= unit and count % (unit // 100) == 0:
            return f"{(Decimal(count) / unit).normalize():f}{suffix}"
    return str(count)


def format_large(count: int) -> str:
    """Return `count` as `1.2e21` if that has at most 16 digits, else as plain digits.

    Exact: `parse_count` returns the same number, also after a conversion to float.
    """
    digits, _, exponent = f"{Decimal(count).normalize():e}".partition("e")
    return str(count) if len(digits) > 16 else f"{digits}e{int(exponent)}"


def format_short(number: float) -> str:
    """Return a rounded number: `950` -> `950`, `12345` -> `12.3k`, `3.2e6` -> `3.2M`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def parse_bytes(text: str) -> int:
    """Return the number of bytes that `1GiB`, `512 MiB`, `1.5GB` or plain digits specify.

    KiB, MiB, GiB and TiB are powers of 1024; KB, MB, GB and TB are powers of 1000. Raises
    ValueError, also for more than `LARGEST_BYTES`.
    """
    match = _BYTES.fullmatch(text.strip())
    units = {name.lower(): size for name, size in BYTE_UNITS.items()}
    if match is None or (match[2] or "B").lower() not in units:
        raise ValueError("should be a number of bytes such as 1GiB, 512MiB or 5GB")
    count = Decimal(match[1]) * units[(match[2] or "B").lower()]
    if count > LARGEST_BYTES:
        raise ValueError(f"is more than {LARGEST_BYTES:.0e} bytes")
    return int(count)


def format_bytes(count: int) -> str:
    """Return a rounded number of bytes with its unit: `64 MiB`, `1.5 GiB`."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if count >= BYTE_UNITS[name]:
            return f"{Decimal(f'{count / BYTE_UNITS[name]:.1f}').normalize():f} {name}"
    return f"{count} B"


def format_in(count: float, unit: str, decimals: int) -> str:
    """Return a number of bytes in a unit of `BYTE_UNITS`, without the unit: `1,234.5`."""
    return f"{count / BYTE_UNITS[unit]:,.{decimals}f}"


def parse_seconds(text: str) -> float:
    """Return the seconds that `90s`, `30min` or `1.5h` specify; raise ValueError for other text."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError("should be a time such as 90s, 30min or 2h")
    return float(match[1]) * _SECONDS[match[2]]


def format_duration(seconds: float | None) -> str:
    """Return `75` as `1m15s`, `4000` as `1h06m`, from one day on `2d03h`; None as `-`."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minute:02}m"
    return f"{minute}m{second:02}s" if minute else f"{second}s"
