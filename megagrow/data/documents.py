"""Read the documents of a unit of work, in any source format."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from megagrow.common.json_text import limited_lines, read_limited
from megagrow.data.sources import SourceUnit, open_hub
from megagrow.errors import DataError

ROWS = 256
"""Rows of a parquet file held in memory at a time."""

DOCUMENT_BYTES = 1_000_000_000
"""Maximum size of a text file, of a JSON line after decompression, and of `ROWS` parquet rows."""


@dataclass(frozen=True)
class Document:
    """Text of a document, valid Unicode, and its share of the unit's size in bytes."""

    text: str
    size: int


def read_documents(unit: SourceUnit, text_key: str) -> Iterator[Document]:
    """Yield the documents of a unit in a fixed order, skipping empty ones.

    Raises DataError naming the file and the line or row if a record has no string under `text_key`
    (not applicable to text files), is not UTF-8, or is damaged.
    """
    match unit.kind:
        case "text" | "lossy text":
            documents = _read_texts(unit)
        case "jsonl":
            documents = _read_json_lines(unit, text_key)
        case "compressed jsonl":
            documents = _read_compressed(unit, text_key)
        case "parquet":
            documents = _read_parquet(unit, text_key)
        case "hub":
            documents = _read_hub(unit, text_key)
    return (document for document in documents if document.text)


def _read_texts(unit: SourceUnit) -> Iterator[Document]:
    errors = "replace" if unit.kind == "lossy text" else "strict"
    for path in unit.files:
        content = read_limited(Path(path), DOCUMENT_BYTES, DataError)
        try:
            yield Document(content.decode("utf-8-sig", errors), len(content))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start}; convert it") from error


def _read_json_lines(unit: SourceUnit, text_key: str) -> Iterator[Document]:
    """Yield the lines that start in [start, stop) of a file."""
    path = unit.files[0]
    with open(path, "rb") as file:
        # Start one byte earlier: if a line ends there, the next line starts in this unit.
        file.seek(max(unit.start - 1, 0))
        if unit.start:
            file.readline()
        position, number = file.tell(), 0
        while position < unit.stop and (line := file.readline(DOCUMENT_BYTES + 1)):
            position += len(line)
            number += 1
            try:
                text = _text_of_line(line, text_key)
            except ValueError as error:
                number += _lines_before(path, unit.start)
                raise DataError(f"{path}: line {number}: {error}") from error
            yield Document(text, len(line))


def _read_compressed(unit: SourceUnit, text_key: str) -> Iterator[Document]:
    path = unit.files[0]
    number, consumed = 0, 0
    with open(path, "rb") as raw:
        try:
            for line in limited_lines(_decompress(raw, path), DOCUMENT_BYTES):
                number += 1
                before, consumed = consumed, raw.tell()
                yield Document(_text_of_line(line, text_key), consumed - before)
        except (ValueError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: line {number}: {error}") from error
        except OSError as error:
            raise DataError(f"{path}: damaged after line {number}: {error}") from error


def _decompress(raw: BinaryIO, path: str) -> BinaryIO:
    """Open a .gz or .zst file with any number of members or frames."""
    codec = "gzip" if path.endswith(".gz") else "zstd"
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, codec))


def _read_parquet(unit: SourceUnit, text_key: str) -> Iterator[Document]:
    path = unit.files[0]
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                raise DataError(f"{path}: no column {text_key!r}; set the text key")
            groups = range(unit.start, unit.stop)
            rows = sum(file.metadata.row_group(group).num_rows for group in groups)
            batches = file.iter_batches(ROWS, row_groups=list(groups), columns=[text_key])
            texts = (text for batch in batches for text in _column(batch, path))
            for number, text in enumerate(texts, start=1):
                where = f"{path}: row {number} from row group {unit.start}"
                yield Document(_checked(text, text_key, where), unit.size // rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged parquet file: {error}") from error


def _column(batch: pyarrow.RecordBatch, path: str) -> list[object]:
    """Return the values of the only column of a batch; a dictionary can repeat large ones."""
    if batch.nbytes > DOCUMENT_BYTES:
        raise DataError(f"{path}: {len(batch)} rows contain {batch.nbytes} bytes, too many")
    values: list[object] = batch.column(0).to_pylist()
    return values


def _read_hub(unit: SourceUnit, text_key: str) -> Iterator[Document]:
    source = unit.files[0]
    dataset, _ = open_hub(source)
    shard = dataset.shard(num_shards=dataset.num_shards, index=unit.start)
    try:
        for number, row in enumerate(shard, start=1):
            where = f"{source}: row {number} of shard {unit.start}"
            text = _checked(row.get(text_key), text_key, where)
            yield Document(text, len(text.encode()))
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot read shard {unit.start}: {error}") from error


def _text_of_line(line: bytes, text_key: str) -> str:
    """Return the text of a JSON line, "" for a blank one; raises ValueError with the problem."""
    if len(line) > DOCUMENT_BYTES:
        raise ValueError(f"longer than the limit of {DOCUMENT_BYTES} bytes")
    try:
        content = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8; convert the file") from error
    if not content:
        return ""
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"no text under the key {text_key!r}; set the text key")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("contains an unpaired surrogate, which UTF-8 cannot encode") from error
    return text


def _checked(text: object, text_key: str, where: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where}: no text under {text_key!r}; set the text key")
    return text


def _lines_before(path: str, offset: int) -> int:
    """Return the number of lines that start before a byte; used for error messages only."""
    with open(path, "rb") as file:
        count = 0
        while file.tell() < offset and file.readline():
            count += 1
    return count
