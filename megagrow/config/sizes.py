"""Numbers written for people: `2M`, `1.5B`, `10K` and back."""

import re
from decimal import Decimal

UNITS = {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3}
_COUNT = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*([KMBT]?)", re.IGNORECASE)
_EXAMPLES = "such as 2048, 2M or 1.5B"


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
