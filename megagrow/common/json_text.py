"""Strict parsing of untrusted JSON, and values that JSON can represent."""

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from megagrow.errors import DataError, InputError

FILE_BYTES = 100_000_000
"""Maximum size of a JSON file; the index of a model with a million tensors is smaller."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes) -> Any:
    """Return the value of one JSON text in UTF-8.

    Raises:
        ValueError: not JSON, duplicate keys, NaN or an infinity, a lone surrogate (which cannot be
            printed), or nesting beyond the recursion limit.
    """
    text = raw.decode("utf-8")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float
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


def read_json(path: Path, error_class: type[InputError] = DataError) -> dict[str, Any]:
    """Return the object in a JSON file. Raises `error_class` with the path if there is none."""
    try:
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key[:60]!r} in one object")
        result[key] = value
    return result


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:60]} is too large")
    return value
