"""Damaged checkpoints: each kind of damage with its error message."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.checkpoint.manifest import read_manifest, write_manifest
from megagrow.common.checksums import FileRecord

STEPS = (9, 10, 100)
SHARD = "rank-00001.safetensors"


def truncate(path: Path) -> None:
    file = path / SHARD
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    """One bit in the middle of a shard; the size stays."""
    content = bytearray((path / SHARD).read_bytes())
    content[len(content) // 2] ^= 16
    (path / SHARD).write_bytes(content)


def rewrite(**changes: object) -> Callable[[Path], None]:
    """Changes fields of the manifest."""

    def damage(path: Path) -> None:
        file = path / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def escape(path: Path) -> None:
    """A manifest that is right in itself but names a file elsewhere."""
    manifest = read_manifest(path)
    write_manifest(path, replace(manifest, files=manifest.files | {"../x": FileRecord(1, "")}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "truncated shard": (truncate, f"{SHARD}: truncated or damaged"),
    "flipped bit": (flip, f"{SHARD}: damaged, its checksum is "),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text(""), "damaged"),
    "cut manifest": (lambda path: (path / "manifest.json").write_text('{"model": {'), "damaged"),
    "binary manifest": (lambda path: (path / "manifest.json").write_bytes(b"\xff\x00"), "damaged"),
    "other json": (lambda path: (path / "manifest.json").write_text("[1, 2]"), "damaged"),
    "field missing": (lambda path: (path / "manifest.json").write_text("{}"), "damaged"),
    "other format": (rewrite(format=1), "written in format 1, this version reads 2"),
    "changed manifest": (rewrite(adam_step=12), "checksum mismatch"),
    "file elsewhere": (escape, "names '../x', which is not a rank's file"),
}
"""Damage to a checkpoint, with the expected message."""


def damaged(good: Path, folder: Path, damage: Callable, steps: tuple[int, ...]) -> Path:
    """A copy of the good checkpoints, some of them damaged."""
    shutil.copytree(good, folder)
    for step in steps:
        damage(folder / checkpoint_name(step))
    return folder
