"""JSON that somebody else may have written, read strictly: it means one thing only. And values as
JSON can write them."""

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from megagrow.errors import DataError, InputError

FILE_BYTES = 100_000_000
"""Of a JSON file; the index of a model with a million tensors is shorter."""


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(raw: bytes) -> Any:
    """The value of one JSON text in UTF-8. Raises ValueError for anything else: two equal keys, of
    which one would win; NaN and infinities, which JSON does not know; halves of surrogate pairs,
    which cannot be printed; nesting too deep to be read."""
    text = raw.decode("utf-8")
    try:
        found = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float
        )
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("lists or objects too deep within each other") from error
    return found


def read_json(path: Path, error_class: type[InputError] = DataError) -> dict[str, Any]:
    """Return the object in a JSON file; raises `error_class`, naming the file, if it has none."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES + 1)
        if len(raw) > FILE_BYTES:
            raise error_class(f"{path}: more than {FILE_BYTES} bytes; not what it is taken for")
        found = parse_json(raw)
    except OSError as error:
        raise error_class(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise error_class(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise error_class(f"{path}: should hold a JSON object")
    return found


def finite(value: Any) -> Any:
    """The value with null in place of each number that JSON does not know: NaN, infinities."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:60]!r} stands twice in one object")
        found[key] = value
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:60]} is too large a number")
    return value
