"""Load the newest valid checkpoint into any layout; each rank reads only its own ranges."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from megagrow.checkpoint.discovery import (
    FoundCheckpoint,
    last_valid,
    list_checkpoints,
    shard_name,
)
from megagrow.checkpoint.manifest import Manifest, parse_manifest
from megagrow.common.checksums import problems_of_files
from megagrow.common.progress import PhaseProgress
from megagrow.errors import CheckpointError
from megagrow.growth.map import identity_map, kept_state
from megagrow.parallel.agreement import run_on_all_ranks, run_on_rank_zero
from megagrow.parallel.sharding import Storage
from megagrow.reshard.copy_ops import block_view, take, write_rows
from megagrow.reshard.copy_plan import Copy, copies_to
from megagrow.reshard.layout import Block, Layout

logger = logging.getLogger(__name__)

_NAMED = 3
"""Number of damaged files of a checkpoint that are listed; the others are counted."""


def newest_valid_on_all_ranks(
    directory: Path, paths: Callable[[], list[Path]] | None = None
) -> FoundCheckpoint | None:
    """Return the newest valid checkpoint, the same on all ranks; None if there is none. Collective.

    "Newest" means most steps, not a time. Each rank verifies its share of the files. Damaged
    checkpoints are skipped with a warning on rank 0. Raises CheckpointError if all are damaged.

    Args:
        directory: folder of the checkpoints.
        paths: returns the checkpoints, the preferred one last; called on rank 0.
    """
    found = run_on_rank_zero(paths or (lambda: list_checkpoints(directory)))
    # All ranks find the same damage.
    level = logging.WARNING if dist.get_rank() == 0 else logging.DEBUG
    return last_valid(directory, found, verify_on_all_ranks, level)


def verify_on_all_ranks(path: Path) -> Manifest:
    """Return rank 0's manifest after all files are verified, file i by rank i mod world size.

    Collective. Raises CheckpointError on all ranks with the damaged files.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    manifest = run_on_rank_zero(lambda: parse_manifest(path))
    mine = list(manifest.files.items())[rank::world]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, list(problems_of_files(path, mine)))
    problems = [text for texts in everyone for text in texts]
    if problems:
        more = f"; and {len(problems) - _NAMED} more files" if len(problems) > _NAMED else ""
        raise CheckpointError("; ".join(problems[:_NAMED]) + more)
    return manifest


def load_storage(path: Path, manifest: Manifest, layout: Layout, storage: Storage) -> int:
    """Fill this rank's empty storage from a checkpoint written in any layout. Collective.

    Returns Adam's step count, 0 if the optimizer has changed so that its state starts again.
    """
    source = manifest.read_layout()
    keep = kept_state(identity_map(list(layout.plan)), source.plan, layout.plan)
    rank = dist.get_rank()
    copies = [c for kind in keep.kinds for c in copies_to(rank, source, keep, layout, kind, near=0)]
    run_on_all_ranks(lambda: _load(path, source, copies, layout, storage))
    if not keep.keeps_step:
        logger.warning("%s: the optimizer has changed, and its state starts at 0", path)
    return manifest.adam_step if keep.keeps_step else 0


def _load(path: Path, source: Layout, copies: list[Copy], layout: Layout, storage: Storage) -> None:
    progress = PhaseProgress(f"loading {path}", len(copies), "blocks")
    with ExitStack() as files:
        opened: dict[int, Any] = {}
        for copy in copies:
            shard = path / shard_name(copy.source_rank)
            try:
                if copy.source_rank not in opened:
                    opened[copy.source_rank] = files.enter_context(safe_open(shard, "pt"))
                _load_copy(opened[copy.source_rank], copy, source, layout, storage)
                progress.advance()
            except SafetensorError as error:
                raise CheckpointError(f"{shard}: cannot be read ({error})") from error


def _load_copy(file: Any, copy: Copy, source: Layout, layout: Layout, storage: Storage) -> None:
    block: Block = copy.source
    offset, stride = source.local(copy.term.source, copy.source_rank, block)
    stop = offset + (len(block.rows) - 1) * stride + len(block.cols)
    rows = range(copy.shape[0])
    name = f"{copy.term.source}.{copy.read_kind}"
    held = len(source.interval(copy.term.source, copy.source_rank))
    tensor = file.get_slice(name)
    found = (tensor.get_dtype(), tensor.get_shape())
    if found != ("F32", [held]):
        raise SafetensorError(f"{name} is {found[0]} {found[1]}, not F32 [{held}]")
    stored = tensor[offset:stop]
    write_rows(copy, rows, take(copy, rows, block_view(stored, block, 0, stride)), layout, storage)
