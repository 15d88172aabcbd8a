"""Bit-for-bit comparison of the data that two checkouts write: tensors, metrics, manifests.

Each file is read as a flat mapping from names to JSON scalars or raw bytes. Times, memory and
descriptions of the environment are ignored.
"""

import argparse
import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

IGNORED_FIELDS = frozenset(
    {
        *("time", "elapsed_seconds", "lost_seconds", "seconds", "stall_seconds"),
        *("tokens_per_second", "mfu", "memory_bytes", "peak_memory_bytes", "path", "name"),
    }
)
"""Fields of records and manifests that depend on the clock, the machine or the file names."""

IGNORED_KINDS = frozenset({"config_change"})
"""Kinds of records that describe the configuration."""

MANIFEST_FIELDS = ("adam_step", "model", "layout", "run", "protected", "format")
"""Fields of a checkpoint's manifest that are compared."""

ALIASES = {"keep_v": "keep_second_moment", "probe_v": "estimate_second_moment"}
"""Serialized names that may differ between the checkouts: old -> new, for keys and values."""


@dataclass(frozen=True)
class RawData:
    """Bytes of a tensor or of a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


Flat = dict[str, Any]
"""Name -> JSON scalar or `RawData`."""


@dataclass(frozen=True)
class Comparison:
    """Result of one comparison: number of compared values, and the first difference."""

    values: int
    difference: str | None = None


def compare_folders(old: Path, new: Path) -> Comparison:
    """Compare all data files of two folders, by relative path."""
    files = [{path.relative_to(root): path for path in data_files(root)} for root in (old, new)]
    if missing := sorted(files[0].keys() ^ files[1].keys()):
        side = "NEW" if missing[0] in files[0] else "OLD"
        return Comparison(0, f"{missing[0]} is missing in {side}")
    if not files[0]:
        return Comparison(0, f"{old} contains no data")
    values = 0
    for relative, path in sorted(files[0].items()):
        comparison = compare_flat(read_flat(path), read_flat(files[1][relative]))
        values += comparison.values
        if comparison.difference is not None:
            return Comparison(values, f"{relative}: {comparison.difference}")
    return Comparison(values)


def compare_flat(old: Flat, new: Flat) -> Comparison:
    """Compare two flat mappings. NEW may have further numbers and texts, but no other tensors."""
    for name in [*old, *new]:
        is_added = name not in old and not isinstance(new[name], RawData)
        if (name in old) != (name in new) and not is_added:
            return Comparison(0, f"{name} is missing in {'NEW' if name in old else 'OLD'}")
    values = 0
    for name, value in old.items():
        difference = _difference(value, new[name])
        if difference is not None:
            return Comparison(values, f"{name}: {difference}")
        values += value.count if isinstance(value, RawData) else 1
    return Comparison(values)


def _difference(old: Any, new: Any) -> str | None:
    if not isinstance(old, RawData) or not isinstance(new, RawData):
        # repr is exact for floats, and distinguishes 1, 1.0 and True.
        return None if repr(old) == repr(new) else f"{old!r} != {new!r}"
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"{old.dtype}{list(old.shape)} != {new.dtype}{list(new.shape)}"
    if old.data == new.data:
        return None
    left, right = (np.frombuffer(raw.data, np.uint8).reshape(old.count, -1) for raw in (old, new))
    differs = (left != right).any(axis=1)
    first = int(differs.argmax())
    return f"{int(differs.sum())} of {old.count} elements differ, the first at index {first}"


def data_files(folder: Path) -> list[Path]:
    """Return the data files of a folder."""
    return [path for path in folder.rglob("*") if path.is_file() and _reader(path) is not None]


def read_flat(path: Path) -> Flat:
    """Read a data file as a flat mapping."""
    reader = _reader(path)
    if reader is None:
        raise ValueError(f"{path}: not a data file")
    return reader(path)


def _reader(path: Path) -> Callable[[Path], Flat] | None:
    return _BY_NAME.get(path.name) or _BY_SUFFIX.get(path.suffix)


def read_metrics(path: Path) -> Flat:
    """Read metrics.jsonl. Records are numbered within their kind, because a background save is
    recorded when it ends."""
    flat: Flat = {}
    numbers: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        kind = record["kind"]
        if kind in IGNORED_KINDS:
            continue
        flat |= flatten(record, f"{kind} {numbers[kind]} (step {record['step']})")
        numbers[kind] += 1
    return flat


def read_manifest(path: Path) -> Flat:
    """Read the compared fields of a checkpoint's manifest; other manifests yield nothing."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if "adam_step" not in values:
        return {}
    if "stage_step" in values["run"]:
        values["run"]["stage_tokens"] = _stage_tokens(values)
        del values["run"]["stage_step"]
    values["run"].pop("finished_tokens", None)  # not recorded by earlier versions
    return flatten({field: values.get(field) for field in MANIFEST_FIELDS}, "")


def _stage_tokens(values: dict[str, Any]) -> int:
    """Return the tokens of the current stage; earlier versions recorded its steps."""
    run = values["run"]
    if run["stage_step"] == 0:
        return 0
    config = values["environment"]["config"]
    batch = config["stages"][run["stage"]]["batch"]["global_batch_size"]
    return int(run["stage_step"] * batch * config["data"]["sequence_length"])


def read_json(path: Path) -> Flat:
    """Read a JSON file."""
    return flatten(json.loads(path.read_text(encoding="utf-8")), "")


def read_safetensors(path: Path) -> Flat:
    """Read all tensors of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    entries.pop("__metadata__", None)
    body = content[8 + length :]
    return {
        name: RawData(entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in sorted(entries.items())
    }


def read_torch(path: Path) -> Flat:
    """Read all tensors and scalars of a file that torch.save wrote."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return flatten(torch.load(path, map_location="cpu", weights_only=True), "")


def read_bytes(path: Path) -> Flat:
    """Read a file as raw bytes."""
    content = path.read_bytes()
    return {"bytes": RawData("U8", (len(content),), content)}


def flatten(value: Any, prefix: str) -> Flat:
    """Flatten nested mappings, lists, namespaces and tensors; ignored fields are omitted."""
    return dict(_leaves(value, prefix))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in IGNORED_FIELDS:
                yield from _leaves(inner, f"{name}.{ALIASES.get(key, key)}".lstrip("."))
    elif isinstance(value, list | tuple):
        yield f"{name} length", len(value)
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{index}]")
    elif isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield name, RawData(str(value.dtype), tuple(value.shape), data)
    else:
        yield name, ALIASES.get(value, value) if isinstance(value, str) else value


_BY_NAME: dict[str, Callable[[Path], Flat]] = {
    "metrics.jsonl": read_metrics,
    "manifest.json": read_manifest,
    "config.json": read_json,
    "generation_config.json": read_json,
    "model.safetensors.index.json": read_json,
}

_BY_SUFFIX: dict[str, Callable[[Path], Flat]] = {
    ".safetensors": read_safetensors,
    ".pt": read_torch,
    ".bin": read_bytes,
    ".idx": read_bytes,
    ".model": read_bytes,
}
