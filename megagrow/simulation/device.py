"""The simulated device: a device type of torch without memory, and DeepSpeed's view of it.

torch allows one private-use device type per process, which cannot be removed. A simulation
therefore runs in a process of its own (`isolated`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import backend_registration

from megagrow.parallel.deepspeed_import import CPU_Accelerator
from megagrow.simulation.autocast import register_autocast

NAME = "simulated"

CAPABILITY = (9, 0)
"""Compute capability of the simulated GPU: Hopper."""

_LIBRARIES: list[torch.library.Library] = []


def register(memory: Callable[[], tuple[int, int]], wait: Callable[[str], None]) -> torch.device:
    """Register the device type with torch and return the device; call once per process.

    Args:
        memory: returns the bytes in use and their peak.
        wait: called with the name of an operation for which the host waits.
    """
    backend_registration._setup_privateuseone_for_python_backend(
        NAME, backend_module=_DeviceModule(memory, wait)
    )
    _LIBRARIES.extend(register_autocast(NAME))
    return torch.device(NAME, 0)


def is_simulated(tensor: Tensor) -> bool:
    """Return True for a tensor of the simulated device."""
    # The property `device` of a FakeTensor is an operation, several times as slow.
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == NAME


class _Stream:
    """Stream without work: the order of operations does not change a simulation."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        torch.get_device_module(NAME).synchronize()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        torch.get_device_module(NAME).synchronize()


class _DeviceModule(backend_registration._DummyBackendModule):
    """Module `torch.simulated`, with the functions of torch.cuda that megagrow and torch call."""

    Stream = _Stream
    Event = _Event

    def __init__(self, memory: Callable[[], tuple[int, int]], wait: Callable[[str], None]) -> None:
        self._memory = memory
        self._wait = wait

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return CAPABILITY

    def get_device_name(self, device: Any = None) -> str:
        return NAME

    def max_memory_allocated(self, device: Any = None) -> int:
        return self._memory()[1]

    def memory_allocated(self, device: Any = None) -> int:
        return self._memory()[0]

    def synchronize(self, device: Any = None) -> None:
        self._wait("synchronize")

    def set_device(self, device: Any) -> None:
        pass

    def stream(self, stream: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def cudart(self) -> Any:
        return SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda _: 0)

    def device(self, device: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


class SimulatedAccelerator(CPU_Accelerator):  # type: ignore[misc]
    """DeepSpeed's accelerator for the simulated device, asynchronous as a GPU."""

    Stream = _Stream
    Event = _Event

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{NAME}:0"

    def device(self, device_index: int | None = None) -> AbstractContextManager[None]:
        return nullcontext()

    def device_count(self) -> int:
        return 1

    def on_accelerator(self, tensor: Tensor) -> bool:
        return is_simulated(tensor)

    def synchronize(self, device_index: int | None = None) -> None:
        torch.get_device_module(NAME).synchronize()

    def stream(self, stream: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def current_stream(self, device_index: int | None = None) -> _Stream:
        return _Stream()

    def default_stream(self, device_index: int | None = None) -> _Stream:
        return _Stream()

    def memory_allocated(self, device_index: int | None = None) -> int:
        return torch.get_device_module(NAME).memory_allocated()

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return torch.get_device_module(NAME).max_memory_allocated()

    def pin_memory(
        self, tensor: Tensor, make_copy: bool = True, match_shape: bool = True
    ) -> Tensor:
        return tensor.pin_memory()

    @property
    def FloatTensor(self) -> Callable[[Any], Tensor]:
        return lambda data: torch.tensor(data, dtype=torch.float32, device=NAME)

    @property
    def IntTensor(self) -> Callable[[Any], Tensor]:
        return lambda data: torch.tensor(data, dtype=torch.int32, device=NAME)

    @property
    def LongTensor(self) -> Callable[[Any], Tensor]:
        return lambda data: torch.tensor(data, dtype=torch.int64, device=NAME)

    @property
    def ByteTensor(self) -> Callable[[Any], Tensor]:
        return lambda data: torch.tensor(data, dtype=torch.uint8, device=NAME)
