"""Saving: every rank writes what it holds; the checkpoint appears when all of it is on the disk."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megagrow.checkpoint.files import checkpoint_name, list_checkpoints, shard_name
from megagrow.checkpoint.manifest import Manifest, write_manifest
from megagrow.checkpoint.retention import remove_unfinished
from megagrow.checkpoint.shards import planned_shard, write_shard
from megagrow.common.atomic_files import check_room, publish, staging_folder
from megagrow.common.checksums import Files
from megagrow.errors import InputError, ResourceError
from megagrow.parallel.agreement import run_on_all_ranks


@dataclass(frozen=True)
class Save:
    """The three parts of a save. `begin` and `publish` are called by all ranks together and raise
    one InputError on all; `write` talks to no other rank and may run in a thread."""

    directory: Path
    step: int

    @property
    def final(self) -> Path:
        """The checkpoint."""
        return self.directory / checkpoint_name(self.step)

    @property
    def partial(self) -> Path:
        """The directory that it is written in."""
        return staging_folder(self.final)

    def begin(self, tensors: dict[str, Tensor]) -> None:
        """Makes the directory, once it is known that the disk has room for what all ranks write."""
        with self._named():
            needed = total_bytes(tensors)
            run_on_all_ranks(lambda: self._begin(needed) if dist.get_rank() == 0 else None)

    def write(self, tensors: dict[str, Tensor]) -> Files:
        """Writes this rank's file and waits until it is on the disk. OSError if it cannot be."""
        if not tensors:
            return {}
        name = shard_name(dist.get_rank())
        return {name: write_shard(self.partial / name, tensors)}

    def publish(self, written: Callable[[], Files], manifest: Callable[[Files], Manifest]) -> None:
        """Makes a checkpoint of what all ranks have written; `written` gives this rank's part."""
        with self._named():
            parts: list[Files] = [{}] * dist.get_world_size()
            dist.all_gather_object(parts, run_on_all_ranks(written))
            made = manifest({name: record for part in parts for name, record in part.items()})
            run_on_all_ranks(lambda: self._finish(made) if dist.get_rank() == 0 else None)

    def _begin(self, needed: int) -> None:
        remove_unfinished(self.directory)
        self.partial.mkdir(parents=True)
        check_room(self.directory, needed)

    def _finish(self, manifest: Manifest) -> None:
        write_manifest(self.partial, manifest)
        publish(self.partial, self.final)  # replaces a damaged one, or one from before a rewind

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Says what was not saved, and what is there instead; leaves nothing half written."""
        try:
            yield
        except InputError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            before = list_checkpoints(self.directory)
            rest = f"the last good one is {before[-1]}" if before else "there is none before it"
            raise ResourceError(
                f"checkpoint {self.final} was not saved: {error}; {rest}"
            ) from error


def total_bytes(tensors: dict[str, Tensor]) -> int:
    """What all ranks together write; all ranks call this."""
    sizes = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, planned_shard(tensors).size if tensors else 0)
    return sum(sizes)
