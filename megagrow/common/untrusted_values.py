"""Validation of names and numbers in untrusted files.

Names must not refer to files outside a folder. Numbers must be possible: a checksum does not show
that they are, because whoever changes a file can compute it again. The limits of numbers are far
above every real run, and low enough that sums and products of accepted numbers neither overflow 64
bits nor become infinite.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megagrow.common.json_text import read_limited
from megagrow.errors import CheckpointError, ConfigError

LONGEST_NAME = 255
"""Bytes; the limit of common file systems."""


def is_plain_name(name: object) -> bool:
    """Return True if a value can only name a file directly in a folder.

    Paths, `..` and unprintable characters are rejected.
    """
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and "/" not in name
        and len(name.encode(errors="replace")) <= LONGEST_NAME
    )


def is_inner_path(path: object) -> bool:
    """Return True if a value can only name a file in a folder or in its subfolders."""
    return isinstance(path, str) and all(map(is_plain_name, path.split("/")))


def read_name(path: Path) -> str:
    """Return the name in a file such as `latest`, without surrounding blanks.

    Raises CheckpointError if the file cannot be read or contains anything but a plain name.
    """
    try:
        name = read_limited(path, 2 * LONGEST_NAME, CheckpointError).decode("utf-8").strip()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not a UTF-8 text file (byte {error.start})") from error
    if not is_plain_name(name):
        raise CheckpointError(f"{path}: {name!r:.100} is not the name of a folder next to it")
    return name


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


def check_option(name: str, value: int | None, lowest: int, highest: int) -> None:
    """Raise ConfigError if an option is set to a number outside its range."""
    if value is not None and not lowest <= value <= highest:
        raise ConfigError(f"{name} = {value}; use a number from {lowest} to {highest}")


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
