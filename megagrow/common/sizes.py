"""Numbers written for people: `2M`, `1.5B`, `10K` and back."""

import re
from decimal import Decimal

UNITS = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}
BYTE_UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
BYTE_UNITS |= {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}
_COUNT = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*([KMBT]?)", re.IGNORECASE)
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?", re.IGNORECASE)
_EXAMPLES = "such as 2048, 2M or 1.5B"

LARGEST_COUNT = 10**27
"""More FLOPs than there will be. Decimal is exact up to here, and products of counts still fit
into a float."""


def parse_count(value: object) -> int:
    """The whole number, 0 or more, that `value` says.

    An int, a float that is whole, or text: digits with `_` between them, a fraction, an exponent,
    and one of the suffixes K (1e3), M (1e6), B (1e9), T (1e12), in either case. Raises ValueError
    for anything else, a result that is not whole included.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"should be a whole number {_EXAMPLES}")
    match = _COUNT.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(f"should be a whole number of 0 or more, {_EXAMPLES}")
    digits, suffix = match.groups()
    count = Decimal(digits.replace("_", "")) * UNITS.get(suffix.upper(), 1)
    if count > LARGEST_COUNT:
        raise ValueError(f"is more than {LARGEST_COUNT:.0e}")
    if count % 1:
        raise ValueError(f"is {count.normalize():f}, which is not a whole number")
    return int(count)


def format_count(count: int) -> str:
    """`count` with the largest suffix that needs at most two decimals, else in plain digits.

    Exact: `parse_count` gives back the same number.
    """
    for suffix, unit in UNITS.items():
        if count >= unit and count % (unit // 100) == 0:
            return f"{(Decimal(count) / unit).normalize():f}{suffix}"
    return str(count)


def format_large(count: int) -> str:
    """`count` as digits and an exponent, `1.2e21`, where that is short; else in plain digits.

    Exact: `parse_count` gives back the same number, even if a float is made of it in between.
    """
    digits, _, exponent = f"{Decimal(count).normalize():e}".partition("e")
    return str(count) if len(digits) > 16 else f"{digits}e{int(exponent)}"


def parse_bytes(text: str) -> int:
    """The number of bytes that `1GiB`, `512 MiB`, `1.5GB` or plain digits say.

    KiB, MiB, GiB and TiB count in 1024s; KB, MB, GB and TB in 1000s. Raises ValueError.
    """
    match = _BYTES.fullmatch(text.strip())
    units = {name.lower(): size for name, size in BYTE_UNITS.items()}
    if match is None or (match[2] or "B").lower() not in units:
        raise ValueError("should be a number of bytes such as 1GiB, 512MiB or 5GB")
    return int(Decimal(match[1]) * units[(match[2] or "B").lower()])


def format_bytes(count: int) -> str:
    """`count` bytes for people, rounded: `64 MiB`, `1.5 GiB`."""
    for name in ("TiB", "GiB", "MiB", "KiB"):
        if count >= BYTE_UNITS[name]:
            return f"{Decimal(f'{count / BYTE_UNITS[name]:.1f}').normalize():f} {name}"
    return f"{count} B"
