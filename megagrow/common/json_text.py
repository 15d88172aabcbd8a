"""Strict JSON: parsing of untrusted texts, and formatting of values it can represent."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from megagrow.errors import DataError, InputError

FILE_BYTES = 100_000_000
"""Maximum size of a JSON file; the index of a model with a million tensors is smaller."""

MOST_VALUES = 2_000_000
"""Maximum number of values of a JSON text, with which it takes less than 1 GB of memory."""

NUMBER_LENGTH = 40
"""Maximum digits of an integer. Every accepted number can be converted to a float."""

LINE_BYTES = 1_000_000
"""Maximum length of a line of a JSON Lines file that megagrow writes."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes, most_values: int = MOST_VALUES) -> Any:
    """Return the value of one JSON text in UTF-8, with or without a byte order mark.

    `most_values` limits its commas and brackets, which bound its values.

    Raises:
        ValueError: not JSON, duplicate keys, NaN or an infinity, an integer of more than
            `NUMBER_LENGTH` characters, a lone surrogate (which cannot be printed), more values
            than `most_values`, or nesting beyond the recursion limit.
    """
    if sum(map(raw.count, (b",", b"[", b"{"))) > most_values:
        raise ValueError(f"more than {most_values} values")
    text = raw.decode("utf-8-sig")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("lists or objects nested too deeply") from error
    return value


def read_limited(path: Path, limit: int, error_class: type[InputError]) -> bytes:
    """Return the content of a file. Raises `error_class` if it is larger than `limit` bytes."""
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise error_class(f"{path}: larger than the limit of {limit} bytes")
    return raw


def limited_lines(file: BinaryIO, limit: int = LINE_BYTES) -> Iterator[bytes]:
    """Yield the lines of a file with their line ends, read one at a time.

    Raises ValueError for a line longer than `limit` bytes, with its number.
    """
    number = 1
    while line := file.readline(limit + 1):
        if len(line) > limit:
            raise ValueError(f"line {number}: longer than the limit of {limit} bytes")
        yield line
        number += 1


def read_json(path: Path, error_class: type[InputError] = DataError) -> dict[str, Any]:
    """Return the object in a JSON file. Raises `error_class` with the path if there is none."""
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would block
            raise error_class(f"{path}: not a regular file")
        value = parse_json(read_limited(path, FILE_BYTES, error_class))
    except OSError as error:
        raise error_class(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise error_class(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise error_class(f"{path}: must contain a JSON object")
    return value


def finite(value: Any) -> Any:
    """Return the value with NaN and infinities replaced by None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_json(value: Any) -> str:
    """Return a value as indented JSON with a final newline; NaN and infinities become null."""
    return json.dumps(finite(value), indent=2, allow_nan=False) + "\n"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key[:60]!r} in one object")
        result[key] = value
    return result


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _int(text: str) -> int:
    if len(text) > NUMBER_LENGTH:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:60]} is too large")
    return value
