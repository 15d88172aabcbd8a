"""Save a checkpoint: every rank writes its shard, then the folder is renamed."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megagrow.checkpoint.discovery import checkpoint_name, list_checkpoints, shard_name
from megagrow.checkpoint.manifest import Manifest, write_manifest
from megagrow.checkpoint.removal import publish_checkpoint, remove_unfinished
from megagrow.checkpoint.shards import planned_shard, write_shard
from megagrow.common.atomic_files import (
    check_room,
    free_staging,
    make_folder,
    remove,
    staging_folder,
)
from megagrow.common.checksums import Files, problem_on_disk
from megagrow.errors import CheckpointError, InputError, ResourceError
from megagrow.parallel.agreement import run_on_all_ranks, run_on_rank_zero

logger = logging.getLogger(__name__)


@dataclass
class Save:
    """One save, in three steps.

    `begin` and `publish` are collective and raise the same error on all ranks; `write` does not
    communicate and may run in a thread.
    """

    directory: Path
    step: int
    partial: Path = field(init=False)
    """Folder in which it is written; another name if `begin` finds it occupied."""

    def __post_init__(self) -> None:
        self.partial = staging_folder(self.final)

    @property
    def final(self) -> Path:
        """Path of the checkpoint."""
        return self.directory / checkpoint_name(self.step)

    def begin(self, tensors: dict[str, Tensor]) -> None:
        """Create the folder after checking the disk space for all ranks. Collective."""
        with self._named():
            needed = total_bytes(tensors)
            self.partial = run_on_rank_zero(lambda: self._begin(needed))

    def write(self, tensors: dict[str, Tensor]) -> Files:
        """Write and sync this rank's file, and read it back from the disk.

        A file that differs is written again once. Raises CheckpointError if it differs again,
        OSError if it cannot be written.
        """
        if not tensors:
            return {}
        path = self.partial / shard_name(dist.get_rank())
        record = write_shard(path, tensors)
        problem = problem_on_disk(path, record)
        if problem is not None:
            logger.warning("%s; writing it again", problem)
            record = write_shard(path, tensors)
            problem = problem_on_disk(path, record)
        if problem is not None:
            raise CheckpointError(f"{problem}, twice after it was written; check the disk")
        return {path.name: record}

    def publish(self, written: Callable[[], Files], manifest: Callable[[Files], Manifest]) -> None:
        """Publish the checkpoint written by all ranks; `written` describes this rank's file.
        Collective."""
        with self._named():
            parts: list[Files] = [{}] * dist.get_world_size()
            dist.all_gather_object(parts, run_on_all_ranks(written))
            made = manifest({name: record for part in parts for name, record in part.items()})
            run_on_all_ranks(lambda: self._finish(made) if dist.get_rank() == 0 else None)

    def _begin(self, needed: int) -> Path:
        make_folder(self.directory)
        remove_unfinished(self.directory)
        self.partial = free_staging(self.final)
        self.partial.mkdir()
        check_room(self.directory, needed)
        return self.partial

    def _finish(self, manifest: Manifest) -> None:
        write_manifest(self.partial, manifest)
        publish_checkpoint(self.partial, self.final)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Convert errors to one that names the failed and the newest checkpoint; remove
        partial files."""
        try:
            yield
        except InputError as error:
            if dist.get_rank() == 0:
                with suppress(OSError):
                    remove(self.partial)
            before = list_checkpoints(self.directory)
            rest = f"the newest one is {before[-1]}" if before else "there is none before it"
            raise ResourceError(
                f"checkpoint {self.final} was not saved: {error}; {rest}"
            ) from error


def total_bytes(tensors: dict[str, Tensor]) -> int:
    """Return the bytes written by all ranks. Collective."""
    sizes = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, planned_shard(tensors).size if tensors else 0)
    return sum(sizes)
