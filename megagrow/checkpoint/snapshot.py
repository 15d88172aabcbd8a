"""A copy of a rank's state in host memory, so that it can be written while it changes."""

from collections.abc import Mapping
from threading import Thread

import torch
from torch import Tensor


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
