"""Read the documents of a unit of work, in any source format."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megagrow.data.sources.file_types import TEXT_LAYOUTS
from megagrow.data.sources.records import (
    InvalidRecord,
    location,
    read_content,
    read_records,
)
from megagrow.data.sources.units import TEXT_KEY, SourceUnit
from megagrow.errors import ConfigError, DataError

MOST_KEYS = 10
"""Keys listed in an error message."""

EMPTY, FILTERED = "empty", "filtered"

_MISSING = object()


@dataclass(frozen=True)
class Document:
    """Text of a document, valid Unicode, and its share of the unit's size in bytes."""

    text: str
    size: int


@dataclass(frozen=True)
class Filter:
    """Condition on a record: the value under a key is, or is not, equal to a given one."""

    key: str
    value: str
    is_equal: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the filter KEY=VALUE or KEY!=VALUE. Raises ConfigError."""
        match = re.fullmatch(r"([^=!][^=]*?)(!?=)([^=].*|)", text, re.DOTALL)
        if match is None:
            raise ConfigError(f"--filter {text}: not of the form KEY=VALUE or KEY!=VALUE")
        return cls(match[1], match[3], match[2] == "=")

    def accepts(self, found: Any) -> bool:
        """Compare a value: a string as text, any other value with VALUE parsed as JSON."""
        return _is_equal(found, self.value) == self.is_equal


@dataclass(frozen=True)
class RecordOptions:
    """Selection of records and of their texts. A key with dots also names nested values."""

    text_key: str = TEXT_KEY
    filters: tuple[Filter, ...] = ()
    """A record must fulfil all of them."""
    skip_invalid: bool = False
    """Skip a record without a valid text instead of raising DataError."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that are read, the text's first."""
        return tuple(dict.fromkeys([self.text_key, *(one.key for one in self.filters)]))


def read_documents(
    unit: SourceUnit, options: RecordOptions, skipped: Counter[str] | None = None
) -> Iterator[Document]:
    """Yield the documents of a unit in a fixed order; adds the others to `skipped` by reason.

    Empty documents are skipped. Raises DataError naming the file and the line, record or row if a
    record has no valid text (unless they are skipped), or if the file is damaged.
    """
    skipped = Counter() if skipped is None else skipped
    read = _read_texts if unit.layout in TEXT_LAYOUTS else _read_records
    for document in read(unit, options, skipped):
        if document.text:
            yield document
        else:
            skipped[EMPTY] += 1


def _read_texts(
    unit: SourceUnit, options: RecordOptions, skipped: Counter[str]
) -> Iterator[Document]:
    errors = "replace" if unit.layout == "lossy text" else "strict"
    for path in unit.files:
        if options.filters:
            raise DataError(f"{path}: a text file has no keys for --filter; remove or exclude it")
        content = read_content(Path(path), unit.compression)
        try:
            yield Document(content.decode("utf-8-sig", errors), len(content))
        except UnicodeDecodeError as error:
            if not options.skip_invalid:
                raise DataError(
                    f"{path}: not UTF-8 at byte {error.start}; convert it, or pass --skip-invalid"
                ) from error
            skipped["not UTF-8"] += 1


def _read_records(
    unit: SourceUnit, options: RecordOptions, skipped: Counter[str]
) -> Iterator[Document]:
    for record in read_records(unit, options.keys):
        try:
            text = _text_of(record.value, options)
        except InvalidRecord as error:
            if not options.skip_invalid:
                raise DataError(
                    f"{location(unit, record.number)}: {error}; pass --skip-invalid to leave out "
                    "such records"
                ) from error
            skipped[error.reason] += 1
            continue
        if text is None:
            skipped[FILTERED] += 1
        else:
            yield Document(text, len(text.encode()) if record.size is None else record.size)


def _text_of(record: Any, options: RecordOptions) -> str | None:
    """Return the text of a record, None if a filter rejects it; raises InvalidRecord."""
    if isinstance(record, InvalidRecord):
        raise record
    if not isinstance(record, dict):
        raise InvalidRecord("not an object", "not a JSON object with keys")
    for condition in options.filters:
        if not condition.accepts(_lookup(record, condition.key, "--filter")):
            return None
    text = _lookup(record, options.text_key, "--text-key")
    if text is None:
        raise InvalidRecord("null text", f"the text under {options.text_key!r} is null")
    if not isinstance(text, str):
        raise InvalidRecord(
            "text is not a string",
            f"the value under {options.text_key!r} is of type {type(text).__name__}, not a string",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRecord(
            "invalid Unicode", "the text contains invalid UTF-8 or an unpaired surrogate"
        ) from error
    return text


def _lookup(record: dict[str, Any], key: str, option: str) -> Any:
    """Return the value under a key, or under nested keys separated by dots."""
    if key in record:
        return record[key]
    node: Any = record
    for part in key.split("."):
        if node is not None:  # a key below null is null
            node = node.get(part, _MISSING) if isinstance(node, dict) else _MISSING
    if node is _MISSING:
        names = ", ".join(map(repr, list(record)[:MOST_KEYS])) or "none"
        raise InvalidRecord(
            f"no key {key!r}", f"no key {key!r}, its keys are {names}; correct {option}"
        )
    return node


def _is_equal(found: Any, wanted: str) -> bool:
    if isinstance(found, str):
        return found == wanted
    try:
        value = json.loads(wanted)
    except ValueError:
        # Dates; Python's spellings of true, false and null are not JSON.
        return not isinstance(found, bool | None) and str(found) == wanted
    return isinstance(found, bool) == isinstance(value, bool) and bool(found == value)
