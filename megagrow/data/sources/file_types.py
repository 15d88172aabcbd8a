"""Formats and compressions of text files, detected by content and extension."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Literal, Protocol, cast

from megagrow.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FileLayout = Literal[
    "text", "lossy text", "json lines", "json array", "json values", "parquet", "hub"
]
"""`json values`: one or more objects that span lines. `lossy text`: invalid UTF-8 is replaced.
`hub`: a dataset of the Hugging Face Hub."""

TEXT_LAYOUTS = ("text", "lossy text")
"""Layouts without records: a file is one document."""

Compression = Literal["", "gzip", "zstd", "bzip2", "xz"]

DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)
"""Exceptions of a truncated or damaged compressed file."""

MAGIC: tuple[tuple[re.Pattern[bytes], Compression], ...] = (
    (re.compile(rb"\x1f\x8b\x08"), "gzip"),
    # The second alternative starts a frame without content, as pzstd writes them.
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), "zstd"),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"), "bzip2"),
    (re.compile(rb"\xfd7zXZ\x00"), "xz"),
)
"""First bytes of compressed files."""

COMPRESSED_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines", ".jl")
TABLE_SUFFIXES = (".csv", ".tsv")
NUMBERING = re.compile(r"([-.]\d+(-of-\d+)?|\.bak|~)+$")
"""End of the names of shards, parts and backups, after the extension."""
HEAD_BYTES = 1 << 16
FIRST_BYTES = 1 << 24
"""Bytes of a .json file from which its layout is detected: lines, or objects that span lines."""
LARGEST_WINDOW_LOG = 31
"""The window of zstd --long=31, 2 GiB."""


@dataclass(frozen=True)
class FileType:
    """Format of a file."""

    layout: FileLayout
    compression: Compression = ""
    suffix: str = ""
    """Extension in lower case, without that of the compression."""
    problem: str = ""
    """Reason why the file cannot be read as text; empty if it can."""
    keys: tuple[str, ...] | None = None
    """Keys of the object, if the file is a .json file of one object."""


def detect(path: Path) -> FileType:
    """Return the type of a file. Raises DataError if a compressed file is damaged."""
    with path.open("rb") as raw:
        compression = _compression(raw.read(16))
        raw.seek(0)
        try:
            stream = open_decompressed(raw, compression)
            head = stream.read(HEAD_BYTES)
            return _type_of(head, stream, compression, _suffix(path.name))
        except DAMAGED as error:
            raise DataError(f"{path}: {compression or 'file'} damaged: {error}") from error


def open_decompressed(raw: BinaryIO, compression: Compression) -> BinaryIO:
    """Return a stream of the decompressed bytes of an open file: any number of members.

    Zero bytes after a member are ignored. Reading raises one of DAMAGED if the file is truncated
    or damaged.
    """
    match compression:
        case "":
            return raw
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        case "zstd":
            options: dict[int, int] = {
                zstd.DecompressionParameter.window_log_max: LARGEST_WINDOW_LOG
            }
            members = _Members(raw, lambda: zstd.ZstdDecompressor(options=options))
        case "bzip2":
            members = _Members(raw, bz2.BZ2Decompressor)
        case "xz":
            members = _Members(raw, lzma.LZMADecompressor)
    return io.BufferedReader(members, HEAD_BYTES)


class _Decompressor(Protocol):
    """Decompressor of one member, as in the modules bz2, lzma and zstd."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Members(io.RawIOBase):
    """Decompressed bytes of concatenated members.

    The classes of the standard library ignore bytes after the first member that do not start
    another one, and so a damaged member.
    """

    def __init__(self, raw: BinaryIO, start: Callable[[], _Decompressor]) -> None:
        self._raw, self._start, self._member = raw, start, start()
        self._input = b""
        self._is_started = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while True:
            if self._member.eof:
                self._input = self._member.unused_data
                self._member, self._is_started = self._start(), False
            if not self._is_started:
                self._input = self._input.lstrip(b"\0")
            if not self._input and self._member.needs_input:
                self._input = self._raw.read(HEAD_BYTES)
                if not self._input and self._is_started:
                    raise EOFError("truncated")
                if not self._input:
                    return 0
                continue
            data = self._member.decompress(self._input, len(target))
            self._input, self._is_started = b"", True
            if data:
                target[: len(data)] = data
                return len(data)


def _compression(head: bytes) -> Compression:
    return next((name for magic, name in MAGIC if magic.match(head)), "")


def _suffix(name: str) -> str:
    """Return the extension of a name in lower case, without compression and numbering."""
    path = PurePath(NUMBERING.sub("", name.lower()) or name)
    if path.suffix in COMPRESSED_SUFFIXES:
        path = PurePath(NUMBERING.sub("", path.stem) or path.stem)
    return path.suffix


def _type_of(head: bytes, stream: BinaryIO, compression: Compression, suffix: str) -> FileType:
    """Return the type of a file of which `head` has been read from `stream`."""
    if head.startswith(b"PAR1") or suffix == ".parquet":
        problem = "a compressed Parquet file; decompress it" if compression else ""
        return FileType("parquet", compression, suffix, problem)
    problem = _problem(head)
    if suffix in TABLE_SUFFIXES:
        return FileType(
            "text", compression, suffix, problem or "a table; convert it to JSON lines or Parquet"
        )
    content = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if suffix in JSON_SUFFIXES and content.startswith(b"["):
        return FileType("json array", compression, suffix, problem)
    layout: FileLayout = "json lines" if suffix in JSON_SUFFIXES else "text"
    keys = None
    if content.startswith(b"{") and (layout == "text" or suffix == ".json"):
        content += stream.read(FIRST_BYTES)
        first, second = (_object(line) for line in _first_lines(content))
        only = _object(content)
        if suffix == ".json":
            keys = None if only is None else tuple(only)
            is_lines = only is None and first is not None
            layout = "json lines" if is_lines else "json values"
        elif first is not None and (second is not None or suffix == ""):
            layout = "json lines"
    return FileType(layout, compression, suffix, problem, keys)


def _first_lines(content: bytes) -> tuple[bytes, bytes]:
    """Return the first two lines that are not empty, b"" for those that do not exist."""
    first, _, rest = content.partition(b"\n")
    return first, rest.lstrip().partition(b"\n")[0]


def _object(content: bytes) -> dict[str, Any] | None:
    """Return the object that is the only JSON value of a text, or None."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _problem(head: bytes) -> str:
    """Return the reason why content cannot be UTF-8 text, "" if there is none."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16 text; convert it to UTF-8"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive; extract it"
    if head[257:262] == b"ustar":
        return "a tar archive; extract it"
    return "not text" if b"\0" in head else ""
