"""Saves that go on in the background while the training goes on: one at a time.

The state is copied to host memory, then a thread of each rank writes, hashes and syncs its copy.
The thread talks to no other rank. When it is done on all of them, which the training loop finds
out with a vote that it takes anyway, they meet for a moment to give the checkpoint its name.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.checkpoint.manifest import Manifest
from megagrow.checkpoint.save import Save
from megagrow.checkpoint.shards import own_tensors
from megagrow.common.checksums import Files
from megagrow.parallel.sharding import Storage
from megagrow.reshard.layout import Layout


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole on the disk."""

    path: Path
    manifest: Manifest
    stall_seconds: float
    """How long the training stood still for it."""
    seconds: float
    """From the beginning of the save until the checkpoint had its name."""


class Saver:
    """The saves of a run. `begin` and `finish` are called by all ranks together."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._directory = directory
        self._snapshot = Snapshot(device)
        self._current: _Current | None = None

    def begin(
        self, step: int, layout: Layout, storage: Storage, manifest: Manifest, background: bool
    ) -> None:
        """Begins a save, in the background or not; `finish` has to have been called for the one
        before. `manifest` names no files yet. InputError on all ranks if there is no room."""
        assert self._current is None
        begun = time.perf_counter()
        save = Save(self._directory, step)
        tensors = own_tensors(layout, storage, dist.get_rank())
        save.begin(tensors)
        if background:
            tensors = self._snapshot.take(tensors)
        writing = _Writing(lambda: save.write(tensors))
        if background:
            writing.start()
        else:
            writing.run()
        self._current = _Current(save, manifest, writing, begun, time.perf_counter() - begun)

    def prepare(self, layout: Layout, storage: Storage) -> None:
        """Makes the memory for the copies of this state, beside what else goes on; of this rank."""
        tensors = own_tensors(layout, storage, dist.get_rank())
        self._snapshot.reserve(sum(tensor.numel() for tensor in tensors.values()))

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing."""
        return self._current is not None and self._current.writing.is_alive()

    def finish(self) -> Saved | None:
        """Waits for the save that has begun, if any, and makes a checkpoint of it. InputError on
        all ranks if any of them could not write; the checkpoints before it stay as they are."""
        current, self._current = self._current, None
        if current is None:
            return None
        begun = time.perf_counter()
        made: list[Manifest] = []

        def manifest(files: Files) -> Manifest:
            made.append(replace(current.manifest, files=files))
            return made[0]

        current.save.publish(current.writing.result, manifest)
        now = time.perf_counter()
        return Saved(current.save.final, made[0], current.stall + now - begun, now - current.begun)

    def release(self) -> None:
        """Gives the copy's memory back; no save may have begun."""
        assert self._current is None
        self._snapshot.release()


class _Writing(Thread):
    """The writing of one rank, as a thread; what goes wrong is kept until it is asked for."""

    def __init__(self, write: Callable[[], Files]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._write = write
        self._files: Files = {}
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._files = self._write()
        except Exception as error:
            self._error = error

    def result(self) -> Files:
        """What was written, when it is; raises what kept it from being written."""
        if self.is_alive():
            self.join()
        if self._error is not None:
            raise self._error
        return self._files


@dataclass(frozen=True)
class _Current:
    save: Save
    manifest: Manifest
    writing: _Writing
    begun: float
    stall: float


class Snapshot:
    """One buffer, which serves every copy; pinned beside a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0)
        self._making: Thread | None = None

    def reserve(self, elements: int) -> None:
        """Makes a buffer for so many numbers, in a thread: to get memory from the system takes
        several times as long as to copy something into it, and nobody has to wait for that."""
        self._wait()
        self._making = Thread(target=self._make, args=(elements,), name="snapshot", daemon=True)
        self._making.start()

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies 1-D fp32 tensors and waits for the copies, which are valid until the next call."""
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
        """Gives the buffer back; the copies must not be in use."""
        self._wait()
        self._buffer = torch.empty(0)

    def _make(self, elements: int) -> None:
        pinned = self._device.type == "cuda"
        # Only what was written to is really there.
        self._buffer = torch.empty(elements, dtype=torch.float32, pin_memory=pinned).zero_()

    def _wait(self) -> None:
        if self._making is not None:
            self._making.join()
            self._making = None
