"""Background checkpoint saves, one at a time.

A thread of each rank copies the state to host memory (`snapshot.py`), then writes, hashes and syncs
its copy. The thread does not communicate. When the training loop's per-step vote shows that all
ranks are done, they publish the checkpoint together.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.checkpoint.listing import problems_of
from megagrow.checkpoint.manifest import Manifest
from megagrow.checkpoint.save import Save
from megagrow.checkpoint.shards import own_tensors
from megagrow.checkpoint.snapshot import Snapshot
from megagrow.common.background import BackgroundCall
from megagrow.common.checksums import Files
from megagrow.parallel.sharding import Storage
from megagrow.reshard.layout import Layout


@dataclass(frozen=True)
class Saved:
    """Completed checkpoint."""

    path: Path
    manifest: Manifest
    stall_seconds: float
    """Seconds that training was stalled."""
    seconds: float
    """Seconds from the start of the save until the checkpoint was published."""
    verified: dict[Path, str | None]
    """First problem of each checkpoint that was verified during the save, None if it is valid."""


class Saver:
    """Saves of a run. `begin` and `finish` are collective.

    After `begin` of a background save, `wait_for_copy` must be called before the state changes.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._directory = directory
        self._snapshot = Snapshot(device)
        self._current: _Current | None = None
        self._stall = 0.0

    def begin(
        self,
        step: int,
        layout: Layout,
        storage: Storage,
        manifest: Manifest,
        background: bool,
        verify: Sequence[Path] = (),
    ) -> None:
        """Begin a save, in the background or not. Collective.

        Requires `finish` of the previous save. `manifest` lists no files yet. The checkpoints
        `verify` are read completely meanwhile, by each rank a share of the files. Raises
        ResourceError on all ranks if there is not enough disk space.
        """
        assert self._current is None
        begun = time.perf_counter()
        save = Save(self._directory, step)
        tensors = own_tensors(layout, storage, dist.get_rank())
        save.begin(tensors)
        share = slice(dist.get_rank(), None, dist.get_world_size())

        def write() -> _Written:
            copies = self._snapshot.copy(tensors) if background else tensors
            return _Written.of(save, copies, verify, share)

        writing = BackgroundCall(write, name="checkpoint")
        if background:
            self._snapshot.begin()
            writing.start()
        else:
            writing.run()
        self._current = _Current(save, manifest, writing, begun)
        self._stall = time.perf_counter() - begun

    def prepare(self, layout: Layout, storage: Storage) -> None:
        """Allocate the snapshot memory of this state in the background; local to the rank."""
        tensors = own_tensors(layout, storage, dist.get_rank())
        self._snapshot.reserve(sum(tensor.numel() for tensor in tensors.values()))

    def wait_for_copy(self) -> None:
        """Wait until the state may change; local to the rank."""
        begun = time.perf_counter()
        self._snapshot.wait()
        self._stall += time.perf_counter() - begun

    @property
    def writing(self) -> bool:
        """Return True while this rank is writing."""
        return self._current is not None and self._current.writing.is_alive()

    def finish(self) -> Saved | None:
        """Wait for the current save, if any, and publish its checkpoint. Collective.

        Raises InputError on all ranks if any of them failed to write; earlier checkpoints are
        unchanged.
        """
        current, self._current = self._current, None
        if current is None:
            return None
        begun = time.perf_counter()
        made: list[Manifest] = []

        def manifest(files: Files) -> Manifest:
            made.append(replace(current.manifest, files=files))
            return made[0]

        current.save.publish(lambda: current.writing.result().files, manifest)
        everywhere: list[dict[Path, str | None]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everywhere, current.writing.result().verified)
        verified = {
            path: next((found[path] for found in everywhere if found[path] is not None), None)
            for path in everywhere[0]
        }
        now = time.perf_counter()
        return Saved(
            current.save.final,
            made[0],
            self._stall + now - begun,
            now - current.begun,
            verified,
        )

    def release(self) -> None:
        """Release the snapshot memory; no save may be in progress."""
        assert self._current is None
        self._snapshot.release()


@dataclass(frozen=True)
class _Written:
    """Result of the writer of one rank."""

    files: Files
    """Record of the rank's file, empty if it has none."""
    verified: dict[Path, str | None]
    """First problem in the rank's share of each verified checkpoint."""

    @classmethod
    def of(
        cls, save: Save, tensors: dict[str, Tensor], verify: Sequence[Path], share: slice
    ) -> "_Written":
        files = save.write(tensors)
        return cls(files, {path: next(iter(problems_of(path, share)), None) for path in verify})


@dataclass(frozen=True)
class _Current:
    save: Save
    manifest: Manifest
    writing: BackgroundCall[_Written]
    begun: float
