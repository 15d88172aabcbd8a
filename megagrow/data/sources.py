"""Text sources, split into units that workers read in parallel.

A source is a file, a folder (walked in sorted order, hidden names skipped), `python-stdlib` (the
interpreter's own sources), or `hf:NAME[:CONFIG[:SPLIT]]` (a Hugging Face dataset, streamed). The
file name determines the format: .jsonl, .jsonl.gz, .jsonl.zst, .parquet; any other is one text.
"""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow
import pyarrow.parquet

from megagrow.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

STDLIB = "python-stdlib"
HUB = "hf:"
COMPRESSED = (".jsonl.gz", ".jsonl.zst")

SMALLEST_UNIT, LARGEST_UNIT = 4 << 20, 256 << 20
UNITS = 2048
"""Target number of units; the unit size in bytes is the input size over UNITS, within the limits.
Enough units for workers to finish together, few enough to keep part files manageable."""

SourceKind = Literal["text", "lossy text", "jsonl", "compressed jsonl", "parquet", "hub"]


@dataclass(frozen=True)
class SourceUnit:
    """Input that one worker reads at a time, with a fixed order of documents."""

    kind: SourceKind
    files: tuple[str, ...]
    """Paths, or the name of a dataset on the Hub."""
    start: int
    """First byte (jsonl), row group (parquet) or shard (hub); a line belongs to the unit in which
    it starts."""
    stop: int
    size: int
    """Bytes of input, for the progress bar; 0 if unknown."""
    state: str
    """Version of the input: sizes and times of files, or the revision of a dataset."""


@dataclass(frozen=True)
class _File:
    path: str
    kind: SourceKind
    size: int
    state: str


def find_units(sources: list[str]) -> list[SourceUnit]:
    """Return all units of the sources in corpus order. Raises DataError for a missing source."""
    parts = [_find_hub(source) if source.startswith(HUB) else _find(source) for source in sources]
    files = [item for part in parts for item in part if isinstance(item, _File)]
    total = sum(file.size for file in files)
    unit_size = min(max(SMALLEST_UNIT, total // UNITS), LARGEST_UNIT)
    return [unit for part in parts for unit in _cut(part, unit_size)]


@lru_cache(maxsize=1)
def open_hub(source: str) -> tuple["IterableDataset", str]:
    """Open the dataset `hf:NAME[:CONFIG[:SPLIT]]` for streaming; return it with its revision."""
    from datasets import load_dataset_builder  # takes seconds to import

    name, config, split = (*source.removeprefix(HUB).split(":"), "", "")[:3]
    try:
        builder = load_dataset_builder(name, config or None)
        dataset = builder.as_streaming_dataset(split=split or "train")
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{source}: cannot open this dataset: {reason}") from error
    files = builder.config.data_files or {}
    origins = [(key, list(value), value.origin_metadata) for key, value in files.items()]
    return dataset, f"{builder.hash} {origins}"


def _find(source: str) -> list[_File]:
    """Return the files of a local source."""
    if source == STDLIB:
        return [_describe(path, "lossy text") for path in _walk_stdlib()]
    path = Path(source)
    if path.is_dir():
        files = [_describe(file, _kind_of(file)) for file in _walk(path)]
        if not files:
            raise DataError(f"{source}: no files in this folder")
        return files
    if not path.is_file():
        raise DataError(f"{source}: no such file or folder; write hf:NAME for a dataset on the Hub")
    return [_describe(path, _kind_of(path))]


def _find_hub(source: str) -> list[SourceUnit]:
    dataset, state = open_hub(source)
    shards = range(dataset.num_shards)
    return [SourceUnit("hub", (source,), shard, shard + 1, 0, state) for shard in shards]


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files under a folder in an order independent of the file system."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        elif path.is_file():
            yield path


def _walk_stdlib() -> Iterator[Path]:
    installed = {"site-packages", "dist-packages"}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _walk(root):
        if path.suffix == ".py" and not installed & set(path.relative_to(root).parts):
            yield path


def _kind_of(path: Path) -> SourceKind:
    if path.name.endswith(".jsonl"):
        return "jsonl"
    if path.name.endswith(COMPRESSED):
        return "compressed jsonl"
    return "parquet" if path.suffix == ".parquet" else "text"


def _describe(path: Path, kind: SourceKind) -> _File:
    status = path.stat()
    size, state = status.st_size, f"{status.st_size} {status.st_mtime_ns}"
    return _File(os.path.abspath(path), kind, size, state)


def _cut(items: list[_File] | list[SourceUnit], unit_size: int) -> Iterator[SourceUnit]:
    """Split items into units: small texts are grouped, large files split into ranges."""
    group: list[_File] = []
    room = unit_size
    for item in items:
        is_text = isinstance(item, _File) and item.kind in ("text", "lossy text")
        if group and (not is_text or room <= 0):
            yield _join(group)
            group, room = [], unit_size
        if isinstance(item, SourceUnit):
            yield item
        elif is_text:
            group.append(item)
            room -= item.size
        else:
            yield from _ranges(item, unit_size)
    if group:
        yield _join(group)


def _join(files: list[_File]) -> SourceUnit:
    paths = tuple(file.path for file in files)
    state = " ".join(file.state for file in files)
    return SourceUnit(files[0].kind, paths, 0, 0, sum(file.size for file in files), state)


def _ranges(file: _File, unit_size: int) -> Iterator[SourceUnit]:
    if file.kind == "compressed jsonl":
        bounds = [(0, file.size, file.size)]
    elif file.kind == "parquet":
        bounds = _row_groups(file.path, unit_size)
    else:
        cuts = [*range(0, file.size, unit_size), file.size]
        bounds = [(start, stop, stop - start) for start, stop in pairwise(cuts)]
    for start, stop, size in bounds:
        yield SourceUnit(file.kind, (file.path,), start, stop, size, file.state)


def _row_groups(path: str, unit_size: int) -> list[tuple[int, int, int]]:
    """Return ranges of row groups of at least `unit_size` bytes: (first, last + 1, bytes)."""
    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file: {error}") from error
    bounds, start, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= unit_size or group == metadata.num_row_groups - 1:
            bounds.append((start, group + 1, size))
            start, size = group + 1, 0
    return bounds
