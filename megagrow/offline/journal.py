"""Journal of an offline growth, so that the same command can resume after a crash.

The first line records the command; each further line records a piece and its checksum. A line is
written only after its data is synced. A lock keeps other processes out.
"""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, Self

from megagrow.common.json_text import FILE_BYTES, parse_json, read_limited
from megagrow.config.deprecated import rename_recorded
from megagrow.errors import CheckpointError, ConfigError, InputError, ResourceError

JOURNAL_FILE = "journal.jsonl"

_BYTES_AT_ONCE, _SECONDS_AT_ONCE = 2**26, 5.0
"""Data is synced after this many bytes, or this much time."""

_LINES: tuple[list[type], ...] = ([int, int], [int, type(None)])
"""Types of the entries of a piece's line."""


class Journal:
    """Journal owned by this process; a context manager that holds the lock.

    `done` maps the index of each finished piece, in the target's order, to its checksum.
    """

    def __init__(self, folder: Path, command: dict[str, Any]) -> None:
        """Start or resume a journal.

        Raises an error if the folder belongs to another command or to a running process.
        """
        self._path = folder / JOURNAL_FILE
        self._folder = folder
        self.done: dict[int, int] = {}
        self._waiting: dict[int, int] = {}
        self._dirty: set[Path] = set()
        self._bytes = 0
        self._committed = time.monotonic()
        self._begun = any(path.name != JOURNAL_FILE for path in folder.iterdir())
        if self._begun and not self._path.is_file():
            raise self._foreign_folder()
        self._file = self._path.open("a+b")
        try:
            self._lock()
            self._begin(command)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, piece: int, checksum: int, path: Path, nbytes: int) -> None:
        """Record a written piece; data is synced from time to time."""
        self._waiting[piece] = checksum
        self._dirty.add(path)
        self._bytes += nbytes
        late = time.monotonic() - self._committed > _SECONDS_AT_ONCE
        if self._bytes >= _BYTES_AT_ONCE or late:
            self.commit()

    def commit(self) -> None:
        """Sync all data, then record the pieces."""
        for path in self._dirty:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        self._append([[piece, checksum] for piece, checksum in self._waiting.items()])
        self.done |= self._waiting
        self._waiting, self._dirty, self._bytes = {}, set(), 0
        self._committed = time.monotonic()

    def void(self, piece: int) -> None:
        """Record that a piece is damaged on disk and must be written again."""
        self._append([[piece, None]])
        del self.done[piece]

    def _append(self, lines: list[Any]) -> None:
        self._file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(f"{self._folder}: another process is writing to it") from error

    def _foreign_folder(self) -> InputError:
        return ConfigError(f"{self._folder}: exists but is not an unfinished growth; remove it")

    def _begin(self, command: dict[str, Any]) -> None:
        text = read_limited(self._path, FILE_BYTES, CheckpointError)
        whole = text[: text.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        if not whole:
            if self._begun:
                raise self._foreign_folder()
            self._append([command])
            return
        before, pieces = self._read(whole.splitlines())
        if before != json.loads(json.dumps(command)):
            differs = sorted(key for key in before | command if before.get(key) != command.get(key))
            raise ConfigError(
                f"{self._folder}: was started by another command (other {', '.join(differs)}); "
                "rerun that command, or remove the folder"
            )
        for piece, checksum in pieces:
            if checksum is None:
                self.done.pop(piece, None)
            else:
                self.done[piece] = checksum

    def _read(self, lines: list[bytes]) -> tuple[dict[str, Any], list[tuple[int, int | None]]]:
        """Read the command, and each piece with its checksum. Raises CheckpointError for damaged
        lines."""
        try:
            command, *pieces = map(parse_json, lines)
        except ValueError as error:
            raise CheckpointError(
                f"{self._path}: damaged ({error}); remove {self._folder}"
            ) from error
        wrong = not isinstance(command, dict) or any(
            not isinstance(line, list) or [type(part) for part in line] not in _LINES
            for line in pieces
        )
        if wrong:
            raise CheckpointError(f"{self._path}: not a journal of a growth; remove {self._folder}")
        return _current_names(command), [(piece, checksum) for piece, checksum in pieces]


def _current_names(command: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded command with the growth options under their current names."""
    growth = command.get("growth")
    options = growth.get("options") if isinstance(growth, dict) else None
    if not isinstance(growth, dict) or not isinstance(options, dict):
        return command
    return command | {"growth": growth | {"options": rename_recorded(options, ("growth",))}}
