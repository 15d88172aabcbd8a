"""A copy of a rank's state in host memory, so that it can be written while it changes."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Snapshot:
    """One buffer, made at the first copy and used again for every other; pinned beside a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies 1-D fp32 tensors and waits for the copies, which are valid until the next call."""
        elements = sum(tensor.numel() for tensor in tensors.values())
        if self._buffer.numel() < elements:
            self.release()
            pinned = self._device.type == "cuda"
            self._buffer = torch.empty(elements, dtype=torch.float32, pin_memory=pinned)
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
        self._buffer = torch.empty(0)
