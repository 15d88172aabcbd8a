"""Saving: every rank writes what it holds; the checkpoint appears when all of it is on the disk."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from megagrow.checkpoint.files import checkpoint_name, list_checkpoints, shard_name, sync
from megagrow.checkpoint.manifest import Manifest, read_manifest, write_manifest
from megagrow.errors import InputError
from megagrow.parallel.topology import together
from megagrow.parallel.zero import Storage
from megagrow.reshard.layout import Layout


def save_checkpoint(
    directory: Path,
    step: int,
    layout: Layout,
    storage: Storage,
    manifest: Callable[[dict[str, int]], Manifest],
) -> Path:
    """Saves the state of all ranks as directory/step-N and returns that path; all ranks together.

    `manifest` makes the manifest from the sizes of the files. If any rank fails, for instance on a
    full disk, all raise the same InputError and earlier checkpoints stay as they are.
    """
    final = directory / checkpoint_name(step)
    partial = final.with_suffix(".tmp")
    rank = dist.get_rank()
    try:
        together(lambda: _begin(partial) if rank == 0 else None)
        written = together(lambda: _write_shard(partial, rank, layout, storage))
        sizes: list[dict[str, int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(sizes, written)
        files = {name: size for part in sizes for name, size in part.items()}
        together(lambda: _finish(partial, final, manifest(files)) if rank == 0 else None)
    except InputError as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        before = list_checkpoints(directory)
        rest = f"the last good one is {before[-1]}" if before else "there is none before it"
        raise InputError(f"checkpoint {final} was not saved: {error}; {rest}") from error
    return final


def prune_checkpoints(directory: Path, keep_last: int) -> None:
    """Removes all before the newest whole checkpoints, and what crashes left; called by rank 0."""
    found = list_checkpoints(directory)
    kept = [path for path in found if _is_whole(path)][-keep_last:]  # damaged ones do not count
    for path in found[: found.index(kept[0]) if kept else 0]:
        # First no longer a checkpoint, then gone: a crash in between leaves no half of one.
        path.rename(path.with_suffix(".tmp"))
    for path in directory.glob("step-*.tmp"):
        shutil.rmtree(path)


def _is_whole(path: Path) -> bool:
    try:
        read_manifest(path)
    except InputError:
        return False
    return True


def _begin(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_shard(partial: Path, rank: int, layout: Layout, storage: Storage) -> dict[str, int]:
    tensors = {
        f"{name}.{kind}": tensor
        for name, kinds in storage.items()
        if layout.writes(name, rank)
        for kind, tensor in kinds.items()
    }
    if not tensors:
        return {}
    path = partial / shard_name(rank)
    try:
        save_file(tensors, path)
        sync(path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    return {path.name: path.stat().st_size}


def _finish(partial: Path, final: Path, manifest: Manifest) -> None:
    write_manifest(partial, manifest)
    sync(partial)
    shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
    partial.rename(final)
    sync(final.parent)
