"""Background checkpoint saves, one at a time.

The state is copied to host memory, then a thread of each rank writes, hashes and syncs its copy.
The thread does not communicate. When the training loop's per-step vote shows that all ranks are
done, they publish the checkpoint together.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.checkpoint.listing import problems_of
from megagrow.checkpoint.manifest import Manifest
from megagrow.checkpoint.save import Save
from megagrow.checkpoint.shards import own_tensors
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
    """Saves of a run. `begin` and `finish` are collective."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._directory = directory
        self._snapshot = Snapshot(device)
        self._current: _Current | None = None

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
        if background:
            tensors = self._snapshot.take(tensors)
        share = slice(dist.get_rank(), None, dist.get_world_size())
        writing = BackgroundCall(
            lambda: _Written.of(save, tensors, verify, share), name="checkpoint"
        )
        if background:
            writing.start()
        else:
            writing.run()
        self._current = _Current(save, manifest, writing, begun, time.perf_counter() - begun)

    def prepare(self, layout: Layout, storage: Storage) -> None:
        """Allocate the snapshot memory for this state in the background; local to the rank."""
        tensors = own_tensors(layout, storage, dist.get_rank())
        self._snapshot.reserve(sum(tensor.numel() for tensor in tensors.values()))

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
            current.stall + now - begun,
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
    stall: float


class Snapshot:
    """Buffer for snapshots, reused by every copy; pinned if there is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0)
        self._making: Thread | None = None

    def reserve(self, elements: int) -> None:
        """Allocate a buffer of this many elements in a thread.

        Allocating memory takes several times as long as copying into it, so it runs in parallel to
        training.
        """
        self._wait()
        self._making = Thread(target=self._make, args=(elements,), name="snapshot", daemon=True)
        self._making.start()

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy 1-D fp32 tensors; the copies are valid until the next call."""
        self._wait()
        elements = sum(tensor.numel() for tensor in tensors.values())
        if self._buffer.numel() < elements:
            self.release()
            self._make(elements)
        copies, begin = {}, 0
        for name, tensor in tensors.items():
            copies[name] = self._buffer[begin : begin + tensor.numel()]
            copies[name].copy_(tensor, non_blocking=True)
            begin += tensor.numel()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return copies

    def release(self) -> None:
        """Release the buffer; the copies must not be in use."""
        self._wait()
        self._buffer = torch.empty(0)

    def _make(self, elements: int) -> None:
        pinned = self._device.type == "cuda"
        # The first write allocates the memory.
        self._buffer = torch.empty(elements, dtype=torch.float32, pin_memory=pinned).zero_()

    def _wait(self) -> None:
        if self._making is not None:
            self._making.join()
            self._making = None
