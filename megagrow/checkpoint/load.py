"""Loading: the newest whole checkpoint, into any layout; each rank reads only what it needs."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from megagrow.checkpoint.files import shard_name
from megagrow.checkpoint.manifest import Manifest
from megagrow.checkpoint.newest import newest_whole
from megagrow.errors import InputError
from megagrow.growth.map import identity_map
from megagrow.parallel.topology import together
from megagrow.parallel.zero import Storage
from megagrow.reshard.layout import Block, Layout
from megagrow.reshard.move import block_view, take, write_rows
from megagrow.reshard.plan import Copy, copies_to


def newest_checkpoint(directory: Path, say: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that is whole, agreed by all ranks; None if there is none at all.

    A damaged one is named through `say` and passed over. InputError if all of them are damaged.
    """
    found = [together(lambda: newest_whole(directory, say) if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def load_storage(path: Path, manifest: Manifest, layout: Layout, storage: Storage) -> None:
    """Fills this rank's storage from a checkpoint written in any layout; all ranks together."""
    source = manifest.read_layout()
    keep = identity_map(list(layout.plan))
    rank = dist.get_rank()
    copies = [c for kind in keep.kinds for c in copies_to(rank, source, keep, layout, kind, near=0)]
    together(lambda: _load(path, source, copies, layout, storage))


def _load(path: Path, source: Layout, copies: list[Copy], layout: Layout, storage: Storage) -> None:
    with ExitStack() as files:
        opened: dict[int, Any] = {}
        for copy in copies:
            shard = path / shard_name(copy.source_rank)
            try:
                if copy.source_rank not in opened:
                    opened[copy.source_rank] = files.enter_context(safe_open(shard, "pt"))
                _load_copy(opened[copy.source_rank], copy, source, layout, storage)
            except SafetensorError as error:
                raise InputError(f"{shard}: cannot be read ({error})") from error


def _load_copy(file: Any, copy: Copy, source: Layout, layout: Layout, storage: Storage) -> None:
    block: Block = copy.source
    offset, stride = source.local(copy.term.source, copy.source_rank, block)
    stop = offset + (len(block.rows) - 1) * stride + len(block.cols)
    rows = range(copy.shape[0])
    stored = file.get_slice(f"{copy.term.source}.{copy.kind}")[offset:stop]
    write_rows(copy, rows, take(copy, rows, block_view(stored, block, 0, stride)), layout, storage)
