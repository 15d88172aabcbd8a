"""Dispatch mode of a simulation: records the work of the device that costs time or memory.

It is entered after FakeTensorMode, and handles the operations that need data: reads of values by
the host, and collectives.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megagrow.parallel.process_groups import Topology
from megagrow.simulation.categories import CATEGORIES, category_of
from megagrow.simulation.device import NAME, is_simulated
from megagrow.simulation.memory import Allocation, MemoryLog
from megagrow.simulation.report import (
    CallTotals,
    CollectiveCall,
    HostCopy,
    HostWait,
    PhasePeak,
    StageReport,
)
from megagrow.simulation.sites import current_site

_aten = torch.ops.aten
_DEVICE_OF = torch.ops.prim.device.default
_READ = _aten._local_scalar_dense.default
_TO_COPY, _COPY = _aten._to_copy.default, _aten.copy_.default
_UNBIND = _aten.unbind.int
_FULL, _CAT = _aten.new_full.default, _aten.cat.default

MOST_VALUES = 1024
"""Elements up to which values written by the host are kept."""


class Recorder(TorchDispatchMode):
    """Counters of one simulation, by the section of the run to which events belong."""

    def __init__(self) -> None:
        super().__init__()
        self.section = ""
        self.memory = MemoryLog()
        self.waits: Counter[HostWait] = Counter()
        self.copies: Counter[HostCopy] = Counter()
        self.collectives: dict[CollectiveCall, CallTotals] = {}

    def begin(self, section: str) -> None:
        """Begin a section of the run, which is also a phase of memory."""
        self.section = section
        self.memory.enter(section)

    def usage(self) -> tuple[int, int]:
        """Return the bytes of memory in use and their peak."""
        return self.memory.current, self.memory.highest

    def report(self, topology: Topology) -> StageReport:
        """Return the counters since the last report and reset them."""
        peaks = {
            phase: PhasePeak(peak.size, _by_category(self.memory.live(peak.time)))
            for phase, peak in self.memory.peaks.items()
        }
        report = StageReport(
            topology.dp, topology.tp, peaks, self.waits, self.copies, self.collectives
        )
        self.waits, self.copies, self.collectives = Counter(), Counter(), {}
        self.memory.peaks = {}
        return report

    def wait(self, operation: str) -> None:
        """Count a wait of the host for the device."""
        self.waits[HostWait(self.section, operation, current_site())] += 1

    def read(self, tensor: Tensor, operation: str = "item") -> list[Any]:
        """Return the elements of a tensor as the host reads them, and count the wait.

        Values that came from the host are exact. Others are 1.0, and 0 or False in tensors of
        integers or bools, which are flags of errors.
        """
        if is_simulated(tensor):
            self.wait(operation)
        values = _values(tensor)
        if values is not None:
            return values
        return [_unknown(tensor)] * tensor.numel()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _DEVICE_OF:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        if func is _READ:
            return self.read(args[0])[0]
        if func.namespace == "c10d" and _reaches_device(args):
            return self._collective(func, args)
        if func is _TO_COPY and _on_simulated(kwargs.get("device")) and not is_simulated(args[0]):
            # FakeTensorMode would copy known values to the device, which has no kernels.
            options = {"dtype": kwargs.get("dtype") or args[0].dtype, "device": kwargs["device"]}
            result = torch.empty(args[0].shape, **options)
        else:
            result = func(*args, **(kwargs or {}))
        if func is _TO_COPY:
            self._copied(args[0], result, kwargs.get("non_blocking", False))
        elif func is _COPY:
            self._copied(args[1], result, len(args) > 2 and args[2])
        self._pass_values(func, args, result)
        if kwargs and kwargs.get("pin_memory"):
            mark_pinned(result)
        self.memory.track(result)
        if func is _TO_COPY and self.memory.label_of(args[0]) == "master weights":
            self.memory.label([result], "weights")  # the copies of autocast
        return result

    def _pass_values(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Keep the values that the host knows in the operations on flags and counts."""
        if func is _UNBIND and args[0].dim() == 1:
            for index, value in enumerate(_values(args[0]) or ()):
                _know(result[index], [value])
        elif func is _FULL and result.numel() <= MOST_VALUES:
            _know(result, [args[2]] * result.numel())
        elif func is _CAT and result.numel() <= MOST_VALUES:
            known = [_values(each) or [_unknown(each)] * each.numel() for each in args[0]]
            _know(result, [value for values in known for value in values])
        elif func._schema.is_mutable and isinstance(args[0], Tensor) and func is not _COPY:
            _know(args[0], None)

    def _copied(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """Record a copy between host and device; values from the host stay readable."""
        if is_simulated(target) and not is_simulated(source):
            self.copies[HostCopy(self.section, is_pinned(source), current_site())] += 1
            _know(target, _values(source))
        elif is_simulated(source) and not is_simulated(target):
            if not non_blocking:
                self.wait("copy to host")
            _know(target, _values(source))

    def _collective(self, func: Any, args: tuple[Any, ...]) -> Any:
        kind = func._schema.name.split("::")[1]
        group = next(each for each in args if isinstance(each, torch.ScriptObject))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))
        tensors = _tensors(args[0]), _tensors(args[1])
        full = max(tensors, key=lambda each: sum(x.nbytes for x in each))
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        key = CollectiveCall(self.section, kind, full[0].dtype, len(ranks), stride)
        calls, payload = self.collectives.get(key, CallTotals(0, 0))
        self.collectives[key] = CallTotals(calls + 1, payload + sum(x.nbytes for x in full))
        if "gather" in kind:
            for output in tensors[0]:
                _know(output, _values(tensors[1][0]))
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)


def _by_category(allocations: Iterable[Allocation]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for allocation in allocations:
        sizes[category_of(allocation)] += allocation.size
    return {name: sizes[name] for name in CATEGORIES}


def _values(tensor: Tensor) -> list[Any] | None:
    """Return the elements of a small tensor that the host has written; None for others."""
    values = getattr(tensor, "values_on_host", None)
    if values is not None or tensor.numel() > MOST_VALUES:
        return values if values is None or len(values) == tensor.numel() else None
    known = tensor.constant if isinstance(tensor, FakeTensor) else tensor
    with _disable_current_modes():
        return None if known is None else known.flatten().tolist()


def _unknown(tensor: Tensor) -> Any:
    return 1.0 if tensor.is_floating_point() else tensor.dtype != torch.bool and 0


def _know(tensor: Tensor, values: list[Any] | None) -> None:
    tensor.values_on_host = values  # type: ignore[attr-defined]


def _tensors(argument: Any) -> list[Any]:
    """Return the tensors of an argument: a tensor, or nested lists of them."""
    if isinstance(argument, Tensor):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [tensor for each in argument for tensor in _tensors(each)]
    return []


def _reaches_device(args: tuple[Any, ...]) -> bool:
    return any(is_simulated(tensor) for each in args for tensor in _tensors(each))


def _on_simulated(device: torch.device | None) -> bool:
    return device is not None and device.type == NAME


def mark_pinned(tensor: Tensor, device: Any = None) -> Tensor:
    """Mark host memory as pinned."""
    tensor.pinned = True  # type: ignore[attr-defined]
    return tensor


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    """Return True for pinned host memory."""
    return getattr(tensor, "pinned", False)
