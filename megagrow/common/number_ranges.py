"""Ranges of the numbers in files that megagrow reads, as pydantic types.

A checksum does not show that a number is possible: whoever changes a file can compute its checksum
again. The limits are far above every real run, and low enough that sums and products of accepted
numbers neither overflow 64 bits nor become infinite.
"""

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

MOST = 10**18
"""Maximum of a number of tokens, steps or bytes."""

Tally = Annotated[int, Field(strict=True, ge=0, le=MOST)]
"""Integer from 0 to 1e18: tokens, steps, bytes or an index."""

Amount = Annotated[float, Field(strict=True, ge=0, le=1e40, allow_inf_nan=False)]
"""Number from 0 to 1e40: FLOPs or seconds."""

Value = Annotated[float, Field(strict=True, ge=-1e40, le=1e40, allow_inf_nan=False)]
"""Finite number of absolute value at most 1e40: a loss or another measurement."""

_TALLY: TypeAdapter[int] = TypeAdapter(Tally)
_AMOUNT: TypeAdapter[float] = TypeAdapter(Amount)
_VALUE: TypeAdapter[float] = TypeAdapter(Value)


def as_tally(value: Any) -> int:
    """Return a value that is a `Tally`. Raises ValueError."""
    return _TALLY.validate_python(value)


def as_amount(value: Any) -> float:
    """Return a value that is an `Amount`. Raises ValueError."""
    return _AMOUNT.validate_python(value)


def as_value(value: Any) -> float:
    """Return a value that is a `Value`. Raises ValueError."""
    return _VALUE.validate_python(value)


def problems_of_values(error: ValidationError) -> str:
    """Return the problems that pydantic found, on one line: each key, its value and the limit."""
    texts = []
    for detail in error.errors(include_url=False):
        path = ".".join(map(str, detail["loc"]))
        problem = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if detail["type"] == "missing":
            texts.append(f"{path} is missing")
        else:
            texts.append(f"{path} = {detail['input']!r:.60} {problem}")
    return "; ".join(texts[:3])
