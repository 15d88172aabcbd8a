"""Text sources, split into units that workers read in parallel.

A source is a file, a folder (see `folders.py`), `python-stdlib` (the interpreter's own sources), or
`hf:NAME[:CONFIG[:SPLIT]]` (a Hugging Face dataset, streamed).
"""

import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
import pyarrow.parquet

from megagrow.data.sources.file_types import (
    TEXT_LAYOUTS,
    Compression,
    FileLayout,
    FileType,
    detect,
)
from megagrow.data.sources.folders import Selection, Skipped, choose_files, list_files
from megagrow.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

STDLIB = "python-stdlib"
HUB = "hf:"
TEXT_KEY = "text"
"""Key of the text of a record by default."""

SMALLEST_UNIT, LARGEST_UNIT = 4 << 20, 256 << 20
UNITS = 2048
"""Target number of units; the unit size in bytes is the input size over UNITS, within the limits.
Enough units for workers to finish together, few enough to keep part files manageable."""


@dataclass(frozen=True)
class SourceUnit:
    """Input that one worker reads at a time, with a fixed order of documents."""

    layout: FileLayout
    compression: Compression
    files: tuple[str, ...]
    """Paths, or the name of a dataset on the Hub."""
    start: int
    """First byte (uncompressed JSON lines), row group (Parquet) or shard (Hub); a line belongs to
    the unit in which it starts."""
    stop: int
    size: int
    """Bytes of input, for the progress bar; 0 if unknown."""
    state: str
    """Version of the input: sizes and times of files, or the revision of a dataset."""


@dataclass(frozen=True)
class FoundSources:
    """All units of the sources in corpus order, and the files of folders that are not read."""

    units: list[SourceUnit]
    skipped: list[Skipped]


@dataclass(frozen=True)
class _File:
    path: str
    layout: FileLayout
    compression: Compression
    size: int
    state: str


def find_sources(
    sources: list[str], text_key: str = TEXT_KEY, selection: Selection | None = None
) -> FoundSources:
    """Find the files of all sources. Raises DataError for a missing, damaged or binary one."""
    if selection is not None and not any(Path(source).is_dir() for source in sources):
        raise ConfigError("--include and --exclude apply to folders, and no source is a folder")
    found = _find_all(sources, text_key, selection)
    if text_key != TEXT_KEY and all(unit.layout in TEXT_LAYOUTS for unit in found.units):
        raise ConfigError(
            f"--text-key {text_key}: the sources are text files, which have no keys; leave it out"
        )
    return found


def _find_all(sources: list[str], text_key: str, selection: Selection | None) -> FoundSources:
    skipped: list[Skipped] = []
    parts: list[list[_File] | list[SourceUnit]] = []
    for source in sources:
        if source.startswith(HUB):
            parts.append(_find_hub(source))
        elif Path(source).is_dir():
            parts.append(_find_folder(source, selection or Selection(), text_key, skipped))
        else:
            parts.append(_find(source))
    files = [item for part in parts for item in part if isinstance(item, _File)]
    total = sum(file.size for file in files)
    unit_size = min(max(SMALLEST_UNIT, total // UNITS), LARGEST_UNIT)
    return FoundSources([unit for part in parts for unit in _cut(part, unit_size)], skipped)


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
    """Return the files of a local source that is not a folder."""
    if source == STDLIB:
        return [_describe(path, FileType("lossy text")) for path in _walk_stdlib()]
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source}: no such file or folder; write hf:NAME for a dataset on the Hub")
    kind = detect(path)
    if kind.problem:
        raise DataError(f"{source}: {kind.problem}")
    return [_describe(path, kind)]


def _find_folder(
    source: str, selection: Selection, text_key: str, skipped: list[Skipped]
) -> list[_File]:
    """Return the files of a folder to read; adds the others to `skipped`."""
    files: list[_File] = []
    before = len(skipped)
    for item in choose_files(Path(source), selection, text_key):
        if isinstance(item, Skipped):
            skipped.append(item)
        else:
            files.append(_describe(*item))
    if not files:
        counts = Counter(item.reason for item in skipped[before:]).most_common(3)
        listed = "".join(f"; skipped {count}: {reason}" for reason, count in counts)
        raise DataError(f"{source}: no files to read in this folder{listed}")
    return files


def _find_hub(source: str) -> list[SourceUnit]:
    dataset, state = open_hub(source)
    shards = range(dataset.num_shards)
    return [SourceUnit("hub", "", (source,), shard, shard + 1, 0, state) for shard in shards]


def _walk_stdlib() -> Iterator[Path]:
    installed = {"site-packages", "dist-packages"}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in list_files(root, Selection(exclude=tuple(installed))):
        if isinstance(path, Path) and path.suffix == ".py":
            yield path


def _describe(path: Path, kind: FileType) -> _File:
    status = path.stat()
    size, state = status.st_size, f"{status.st_size} {status.st_mtime_ns}"
    return _File(os.path.abspath(path), kind.layout, kind.compression, size, state)


def _cut(items: list[_File] | list[SourceUnit], unit_size: int) -> Iterator[SourceUnit]:
    """Split items into units: small texts are grouped, large files split into ranges."""
    group: list[_File] = []
    room = unit_size
    for item in items:
        is_text = isinstance(item, _File) and item.layout in TEXT_LAYOUTS
        if group and (not is_text or room <= 0 or item.compression != group[0].compression):
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
    size = sum(file.size for file in files)
    return SourceUnit(files[0].layout, files[0].compression, paths, 0, 0, size, state)


def _ranges(file: _File, unit_size: int) -> Iterator[SourceUnit]:
    if file.layout == "parquet":
        bounds = _row_groups(file.path, unit_size)
    elif file.layout == "json lines" and not file.compression:
        cuts = [*range(0, file.size, unit_size), file.size]
        bounds = [(start, stop, stop - start) for start, stop in pairwise(cuts)]
    else:
        bounds = [(0, file.size, file.size)]
    for start, stop, size in bounds:
        yield SourceUnit(file.layout, file.compression, (file.path,), start, stop, size, file.state)


def open_parquet(path: str) -> pyarrow.parquet.ParquetFile:
    """Open a Parquet file with a name of any bytes. Raises OSError and ArrowException."""
    return pyarrow.parquet.ParquetFile(pyarrow.OSFile(os.fsencode(path)))


def _row_groups(path: str, unit_size: int) -> list[tuple[int, int, int]]:
    """Return ranges of row groups of at least `unit_size` bytes: (first, last + 1, bytes)."""
    try:
        with open_parquet(path) as file:
            metadata = file.metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file: {error}") from error
    bounds, start, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= unit_size or group == metadata.num_row_groups - 1:
            bounds.append((start, group + 1, size))
            start, size = group + 1, 0
    return bounds
