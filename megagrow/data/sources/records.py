"""Read the records of a unit: JSON values, rows of a table or of a dataset."""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow

from megagrow.common.json_text import limited_lines
from megagrow.data.sources.file_types import DAMAGED, Compression, open_decompressed
from megagrow.data.sources.units import SourceUnit, open_hub, open_parquet
from megagrow.errors import DataError

ROWS = 256
"""Rows of a Parquet file held in memory at a time."""

DOCUMENT_BYTES = 1_000_000_000
"""Maximum size of a text file, of a JSON record, and of `ROWS` Parquet rows."""

CHUNK = 1 << 20
"""Characters of a JSON file read at a time."""

NEAR_THE_END = 16
"""Characters before the end of a chunk in which a JSON error may come from the cut."""

_SPACE = re.compile(r"[ \t\r\n]*")


class InvalidRecord(Exception):
    """A record without a usable text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason
        """Short reason, for counting."""


@dataclass(frozen=True)
class SourceRecord:
    """A record of a unit."""

    number: int
    """Number of the line, record or row, from 1; see `location`."""
    size: int | None
    """Bytes of input since the previous record; None if unknown."""
    value: Any
    """The record, or the InvalidRecord that explains why it cannot be parsed."""


def read_records(unit: SourceUnit, keys: tuple[str, ...]) -> Iterator[SourceRecord]:
    """Yield the records of a unit in a fixed order; `keys` are the columns to read of a table.

    Raises DataError if the file is damaged or has no such column.
    """
    match unit.layout:
        case "json lines":
            yield from _lines(unit)
        case "json array" | "json values":
            yield from _values(unit)
        case "parquet":
            yield from _rows(unit, keys)
        case "hub":
            yield from _hub_rows(unit)


def location(unit: SourceUnit, number: int) -> str:
    """Return the place of a record for error messages."""
    path = unit.files[0]
    match unit.layout:
        case "json lines":
            return f"{path}: line {number + _lines_before(path, unit.start)}"
        case "parquet":
            return f"{path}: row {number}"
        case "hub":
            return f"{path}: row {number} of shard {unit.start}"
    return f"{path}: record {number}"


def read_content(path: Path, compression: Compression) -> bytes:
    """Return the decompressed content of a file. Raises DataError if it is damaged or too large."""
    try:
        with path.open("rb") as raw:
            content = open_decompressed(raw, compression).read(DOCUMENT_BYTES + 1)
    except DAMAGED as error:
        raise DataError(f"{path}: damaged: {error}") from error
    if len(content) > DOCUMENT_BYTES:
        raise DataError(f"{path}: larger than the limit of {DOCUMENT_BYTES} bytes")
    return content


def _lines(unit: SourceUnit) -> Iterator[SourceRecord]:
    """Yield the JSON lines that start in [start, stop) of a file, or all of a compressed file."""
    path, number, before = Path(unit.files[0]), 0, 0
    with path.open("rb") as raw:
        file = open_decompressed(raw, unit.compression)
        if unit.start:
            # Start one byte earlier: if a line ends there, the next line starts in this unit.
            file.seek(unit.start - 1)
            file.readline(DOCUMENT_BYTES)
            before = file.tell()
        try:
            if not unit.compression and before >= unit.stop:
                return
            for number, line in enumerate(limited_lines(file, DOCUMENT_BYTES), start=1):
                position = raw.tell() if unit.compression else before + len(line)
                if line.strip():
                    yield SourceRecord(number, position - before, _parsed(line))
                before = position
                if not unit.compression and before >= unit.stop:
                    return
        except ValueError as error:  # a line beyond the limit
            where = location(unit, number + 1)
            raise DataError(f"{where}: longer than the limit of {DOCUMENT_BYTES} bytes") from error
        except DAMAGED as error:
            raise DataError(f"{path}: damaged after line {number}: {error}") from error


def _parsed(line: bytes) -> Any:
    """Return the value of a JSON line, or an InvalidRecord."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return InvalidRecord("not UTF-8", "not UTF-8; convert the file")
    except json.JSONDecodeError as error:
        return InvalidRecord("not JSON", f"not JSON: {error.msg}")
    except ValueError as error:  # an integer of more than 4300 digits
        return InvalidRecord("not JSON", f"not JSON: {error}")
    except RecursionError:
        return InvalidRecord("not JSON", "lists or objects are nested too deeply")


def _lines_before(path: str, offset: int) -> int:
    """Return the number of lines that start before a byte."""
    with open(path, "rb") as file:
        count = 0
        while file.tell() < offset and file.readline():
            count += 1
    return count


def _values(unit: SourceUnit) -> Iterator[SourceRecord]:
    """Yield the elements of a JSON list, or objects that span lines."""
    path, number, before = Path(unit.files[0]), 0, 0
    with path.open("rb") as raw:
        # Invalid bytes become surrogates, which are refused in a text.
        text = io.TextIOWrapper(
            open_decompressed(raw, unit.compression), "utf-8-sig", "surrogateescape"
        )
        stream = _JsonStream(text)
        values = stream.elements() if unit.layout == "json array" else stream.values()
        try:
            for number, value in enumerate(values, start=1):
                yield SourceRecord(number, raw.tell() - before, value)
                before = raw.tell()
        except DAMAGED as error:
            raise DataError(f"{path}: damaged after record {number}: {error}") from error
        except ValueError as error:
            raise DataError(f"{path}: not JSON after record {number}: {error}") from error
        except RecursionError as error:
            raise DataError(f"{path}: nested too deeply after record {number}") from error


class _JsonStream:
    """JSON values of a text that is read in chunks."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._decoder = stream, json.JSONDecoder()
        self._buffer, self._position = "", 0

    def elements(self) -> Iterator[Any]:
        """Yield the elements of a list. Raises ValueError for anything else."""
        self._take("[")
        if self._peek() == "]":
            self._take("]")
        else:
            yield self._value()
            while self._peek() == ",":
                self._take(",")
                yield self._value()
            self._take("]")
        if self._peek():
            raise ValueError("text after the end of the list")

    def values(self) -> Iterator[Any]:
        """Yield values separated by whitespace."""
        while self._peek():
            yield self._value()

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._buffer) - NEAR_THE_END
                is_cut |= error.msg.startswith("Unterminated string")
                if not is_cut or not self._read():
                    raise ValueError(error.msg) from error
                continue
            if end == len(self._buffer) and self._read():
                continue  # a number may be longer
            self._position = end
            return value

    def _peek(self) -> str:
        """Return the next character that is not whitespace, "" at the end."""
        while True:
            match = _SPACE.match(self._buffer, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read():
                return ""

    def _take(self, expected: str) -> None:
        if self._peek() != expected:
            raise ValueError(f"{expected!r} expected")
        self._position += 1

    def _read(self) -> bool:
        """Append a chunk, as long as the unread text so that repeated parsing stays linear."""
        rest = self._buffer[self._position :]
        if len(rest) > DOCUMENT_BYTES:
            raise ValueError(f"a record is longer than the limit of {DOCUMENT_BYTES} bytes")
        chunk = self._stream.read(max(CHUNK, len(rest)))
        self._buffer, self._position = rest + chunk, 0
        return bool(chunk)


def _rows(unit: SourceUnit, keys: tuple[str, ...]) -> Iterator[SourceRecord]:
    path = unit.files[0]
    try:
        with open_parquet(path) as file:
            for key in keys:
                if not _has_column(file.schema_arrow, key):
                    names = ", ".join(file.schema_arrow.names[:10])
                    raise DataError(f"{path}: no column {key!r}; its columns are {names}")
            counts = [file.metadata.row_group(n).num_rows for n in range(unit.stop)]
            number, rows = sum(counts[: unit.start]), sum(counts[unit.start :])
            groups = list(range(unit.start, unit.stop))
            for batch in file.iter_batches(ROWS, row_groups=groups, columns=list(keys)):
                if batch.nbytes > DOCUMENT_BYTES:  # a dictionary can repeat large values
                    raise DataError(
                        f"{path}: {len(batch)} rows contain {batch.nbytes} bytes, too many"
                    )
                for value in _dictionaries(batch):
                    number += 1
                    yield SourceRecord(number, unit.size // rows, value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged parquet file: {error}") from error


def _has_column(schema: pyarrow.Schema, key: str) -> bool:
    """Return True if a table has a column of this name, or of nested names separated by dots."""
    if key in schema.names:
        return True
    fields = {field.name: field for field in schema}
    for part in key.split("."):
        if part not in fields:
            return False
        kind = fields[part].type
        nested = range(kind.num_fields) if pyarrow.types.is_struct(kind) else ()
        fields = {kind.field(n).name: kind.field(n) for n in nested}
    return True


def _dictionaries(batch: pyarrow.RecordBatch) -> Iterator[Any]:
    """Yield the rows of a batch; a row with a string that is not UTF-8 as InvalidRecord."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(len(batch)):
            try:
                (value,) = batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as error:
                value = InvalidRecord("not UTF-8", f"not UTF-8 at byte {error.start} of a string")
            yield value


def _hub_rows(unit: SourceUnit) -> Iterator[SourceRecord]:
    source = unit.files[0]
    dataset, _ = open_hub(source)
    shard = dataset.shard(num_shards=dataset.num_shards, index=unit.start)
    try:
        for number, row in enumerate(shard, start=1):
            yield SourceRecord(number, None, row)
    except (ValueError, *DAMAGED) as error:
        raise DataError(f"{source}: cannot read shard {unit.start}: {error}") from error
