"""Snapshots of a rank's state in host memory, copied in parallel to training.

Only the update at the end of a step changes the state. It is copied while the forward and backward
passes of the next step run, and the update waits for the rest of the copy.
"""

import logging
from collections.abc import Mapping
from functools import partial
from threading import Event
from typing import Any

import torch
from torch import Tensor

from megagrow.common.background import BackgroundCall
from megagrow.common.sizes import format_bytes
from megagrow.parallel.materialize import zeros

logger = logging.getLogger(__name__)

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all CUDA contexts."""


class HostMemory:
    """Host memory of an exact size, pinned if the device is a GPU, until `free`.

    torch's allocator of pinned memory rounds sizes up to a power of two and never returns memory.
    If the memory cannot be pinned, a warning is logged; copies from the GPU are then slower.
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        # The first write allocates the memory.
        self.values = zeros(elements, torch.float32, "cpu").zero_()
        """(elements,) fp32."""
        self._device = device
        self._pinned = False
        if device.type != "cpu" and elements > 0:
            self._pin()

    def free(self) -> None:
        """Return the memory to the system; `values` must not be used any more."""
        if self._pinned:
            self._cudart().cudaHostUnregister(self.values.data_ptr())
        self._pinned = False
        self.values = torch.empty(0)

    def _cudart(self) -> Any:
        return torch.get_device_module(self._device).cudart()

    def _pin(self) -> None:
        address, size = self.values.data_ptr(), self.values.nbytes
        error = int(self._cudart().cudaHostRegister(address, size, _PORTABLE))
        self._pinned = error == 0
        if error:
            logger.warning(
                "cannot pin %s of host memory for checkpoints (CUDA error %d); saves delay "
                "training longer",
                format_bytes(size),
                error,
            )


class Snapshot:
    """Copy of a rank's state, in a buffer that is reused by every copy.

    `begin` is called by the training thread, `copy` by another one, and `wait` by the training
    thread before the state changes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = HostMemory(0, device)
        self._making: BackgroundCall[None] | None = None
        self._copied = Event()
        self._copied.set()
        self._ready: Any = None

    def reserve(self, elements: int) -> None:
        """Allocate a buffer of this many elements in a thread.

        Allocating memory takes several times as long as copying into it, so it runs in parallel to
        training.
        """
        self._finish_making()
        self._making = BackgroundCall(partial(self._make, elements), name="snapshot")
        self._making.start()

    def begin(self) -> None:
        """Announce a copy of the state as it is now."""
        self._copied.clear()
        if self._device.type != "cpu":
            gpu = torch.get_device_module(self._device)
            self._ready = gpu.current_stream(self._device).record_event()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy 1-D fp32 tensors; the copies are valid until the next call."""
        try:
            self._finish_making()
            elements = sum(tensor.numel() for tensor in tensors.values())
            if self._memory.values.numel() != elements:
                self._make(elements)
            parts = self._memory.values.split([tensor.numel() for tensor in tensors.values()])
            copies = dict(zip(tensors, parts, strict=True))
            self._copy(tensors, copies)
            return copies
        finally:
            self._copied.set()

    def wait(self) -> None:
        """Wait until the state has been copied, or could not be."""
        self._copied.wait()

    def release(self) -> None:
        """Free the buffer; the copies must not be in use."""
        self._finish_making()
        self._memory.free()

    def _copy(self, tensors: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> None:
        if self._device.type == "cpu":
            for name, tensor in tensors.items():
                copies[name].copy_(tensor)
            return
        gpu = torch.get_device_module(self._device)
        stream = gpu.Stream(self._device)
        stream.wait_event(self._ready)
        with gpu.stream(stream):
            for name, tensor in tensors.items():
                copies[name].copy_(tensor, non_blocking=True)
        stream.synchronize()

    def _make(self, elements: int) -> None:
        self._memory.free()
        self._memory = HostMemory(elements, self._device)

    def _finish_making(self) -> None:
        if self._making is not None:
            making, self._making = self._making, None
            making.result()
