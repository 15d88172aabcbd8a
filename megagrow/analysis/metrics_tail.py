"""Records of a metrics.jsonl that is still written, read incrementally and in bounded memory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from megagrow.analysis.run_records import of_kind
from megagrow.common.json_text import limited_lines
from megagrow.errors import DataError
from megagrow.train.reporting.metrics import parse_record
from megagrow.train.reporting.writers import Record

MOST_RECORDS = 20_000
"""Maximum number of records; above it, neighboring train records are averaged."""
KINDS = ("start", "config_change", "train", "validation", "evaluation", "growth", "samples", "end")
"""Kinds of records that `curves` reads."""
COSTS = ("step", "tokens", "flops", "flops_true", "elapsed_seconds")
AVERAGED = ("loss", "grad_norm", "tokens_per_second", "mfu", "memory_bytes")
"""Fields of a train record that are averaged over several steps."""


class MetricsTail:
    """Records of one file for `curves.load_any_curves`.

    Each `poll` reads only the lines that were appended. A file that a resume or a rewind has
    rewritten is read again from its start. In long runs, neighboring train records of one stage
    are averaged in pairs, and again each time the number of records has doubled.
    """

    def __init__(self, path: Path, most_records: int = MOST_RECORDS) -> None:
        self._path = path
        self._most_records = most_records
        self._inode = -1
        self._clear()

    def _clear(self) -> None:
        self.records: list[Record] = []
        self._offset, self._lines, self._last_line = 0, 0, b""
        self._limit = self._most_records

    def poll(self) -> bool:
        """Read the new lines; return True if the records changed.

        Raises DataError for a missing file and for a line that is not a record.
        """
        if not self._path.is_file():
            raise DataError(f"{self._path}: no such file; wait until the run has started")
        with self._path.open("rb") as file:
            rewritten = not self._continues(file)
            if rewritten:
                self._clear()
                self._inode = os.fstat(file.fileno()).st_ino
            file.seek(self._offset)
            before = self._lines
            try:
                self._append_lines(file)
            except DataError:
                self._clear()
                raise
        return rewritten or self._lines > before

    def _continues(self, file: BinaryIO) -> bool:
        """Return True if it is the same file and still contains the last line that was read."""
        if os.fstat(file.fileno()).st_ino != self._inode:
            return False
        file.seek(self._offset - len(self._last_line))
        return file.read(len(self._last_line)) == self._last_line

    def _append_lines(self, file: BinaryIO) -> None:
        try:
            for line in limited_lines(file):
                if not line.endswith(b"\n"):  # still being written
                    return
                self._lines += 1
                self._append(line)
                self._offset += len(line)
                self._last_line = line
        except ValueError as error:
            raise DataError(f"{self._path}: after line {self._lines}, {error}") from error

    def _append(self, line: bytes) -> None:
        record = parse_record(line)
        if record is None:
            raise DataError(f"{self._path} line {self._lines}: not a metrics record")
        if record["kind"] not in KINDS or record.get("skipped"):
            return
        if record["kind"] == "samples":
            for old in of_kind(self.records, "samples"):
                self.records.remove(old)
        if record["kind"] == "train":
            kept = ("kind", "stage", *COSTS, *AVERAGED)
            record = {key: record[key] for key in kept if key in record}
        self.records.append(record)
        if len(self.records) > self._limit:
            self.records = average_pairs(self.records)
            self._limit = max(self._most_records, 2 * len(self.records))


def average_pairs(records: Sequence[Record]) -> list[Record]:
    """Return the records with each two consecutive train records of a stage averaged into one.

    The average has the costs of the second record. A field is None if either record lacks it.
    """
    result: list[Record] = []
    open_pair = False
    for record in records:
        pairs = record["kind"] == "train"
        if pairs and open_pair and result[-1].get("stage") == record.get("stage"):
            result[-1] = record | _averages(result[-1], record)
            open_pair = False
        else:
            result.append(record)
            open_pair = pairs
    return result


def _averages(first: Record, second: Record) -> Record:
    means: Record = {}
    for key in AVERAGED:
        pair = first.get(key), second.get(key)
        numbers = [value for value in pair if isinstance(value, int | float)]
        means[key] = sum(numbers) / 2 if len(numbers) == 2 else None
    return means
