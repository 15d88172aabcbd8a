"""CPU model of Gluon on one Hopper multiprocessor, for testing kernels without a GPU.

It executes a kernel's own functions, with a `gl` whose tensors are PyTorch's and a thread for each
partition of warps. Asynchronous operations complete as late as possible: a TMA load poisons its
destination immediately and completes at any later time; a wgmma reads its operands when it is
issued, to check that they are available, and again when it is waited for. The seed determines the
random choice of the next partition at each barrier and the completion times of loads. A kernel that
overwrites, reads or returns data too early therefore produces NaN, and one that waits forever
raises Deadlock. Layouts, warps within a partition and the memory proxies are not modeled.
"""

from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import constexpr

from tests.helpers.kernels.gluon_machine import (
    Barrier,
    Descriptor,
    Memory,
    Partitions,
    Pending,
    Pointer,
)


class Model:
    """Replacement of Gluon's functions in a kernel, for one program of a grid."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.partitions = Partitions(seed)
        self.program, self.programs = torch.tensor(program), torch.tensor(programs)

    def namespace(self) -> dict[str, Any]:
        """Return the names that a kernel module imports from Gluon, as attention_hopper does."""
        gl = {name: getattr(torch, name) for name in ("int64", "float32", "exp2", "log2")}
        gl |= dict.fromkeys(
            ("NVMMADistributedLayout", "BlockedLayout", "SliceLayout", "DotOperandLayout"),
            lambda *_, **__: None,
        )
        gl |= {name: getattr(self, name) for name in dir(self) if not name.startswith("_")}
        barriers = SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=self.initialise,
            expect=self.expect,
            arrive=self.arrive,
            wait=self.wait,
        )
        return {
            "gl": SimpleNamespace(**gl),
            "mbarrier": barriers,
            "load_tile": self.load_tile,
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self.warpgroup_mma,
            "warpgroup_mma_wait": self.warpgroup_mma_wait,
        }

    static_range = range

    def program_id(self, _: int) -> Tensor:
        return self.program

    def num_programs(self, _: int) -> Tensor:
        return self.programs

    def load(self, pointer: Pointer) -> Tensor:
        return pointer.load()

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        pointer.store(value, mask)

    def arange(self, first: int, last: int, _: None) -> Tensor:
        return torch.arange(first, last)

    def full(self, shape: list[int], value: float, dtype: torch.dtype, _: None) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    def zeros(self, shape: list[int], dtype: torch.dtype, _: None) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def expand_dims(self, x: Tensor, axis: int) -> Tensor:
        return x.unsqueeze(axis)

    def convert_layout(self, x: Tensor, _: None) -> Tensor:
        return x

    def where(self, condition: Any, one: Any, other: Any) -> Tensor:
        return torch.where(torch.as_tensor(condition), one, other)

    def maximum(self, one: Any, other: Any) -> Tensor:
        return torch.maximum(torch.as_tensor(one), torch.as_tensor(other))

    def minimum(self, one: Any, other: Any) -> Tensor:
        return torch.minimum(torch.as_tensor(one), torch.as_tensor(other))

    def max(self, x: Tensor, axis: int) -> Tensor:
        return x.amax(axis)

    def sum(self, x: Tensor, axis: int) -> Tensor:
        return x.sum(axis)

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], _: Any) -> Memory:
        if dtype == torch.int64:
            return Memory([Barrier() for _ in range(shape[0])], dtype)
        memory = Memory(torch.empty(shape, dtype=dtype), dtype)
        memory.poison()
        return memory

    def warp_specialize(
        self, partitions: list[Any], warps: list[int], registers: list[int]
    ) -> None:
        assert len(warps) == len(registers) == len(partitions) - 1
        self.partitions.run(partitions)

    def initialise(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.left = count

    def expect(self, barrier: Barrier, nbytes: int) -> None:
        barrier.bytes += nbytes
        self.arrive(barrier)

    def arrive(self, barrier: Barrier) -> None:
        barrier.left -= 1
        barrier.step()
        self.partitions.wait_until(lambda: True)

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.partitions.wait_until(lambda: barrier.passed(int(parity)))

    def load_tile(
        self, source: Descriptor, corner: list[Any], barrier: Barrier, to: Memory
    ) -> None:
        block = source.block(corner)
        assert block.shape == to.shape and block.dtype == to.dtype
        to.poison()

        def land() -> None:
            to.data.copy_(block)
            barrier.bytes -= block.numel() * block.element_size()
            barrier.step()

        self.partitions.loads.append(land)

    def warpgroup_mma(
        self, a: Any, b: Memory, accumulator: Tensor, *, use_acc: bool = True, is_async: bool
    ) -> Pending:
        assert is_async and accumulator.dtype == torch.float32 and a.dtype == b.dtype
        pending = Pending(a, b, accumulator if use_acc else None)
        self.partitions.local.matmuls.append(pending)
        return pending

    def warpgroup_mma_wait(self, outstanding: int, deps: tuple[Any, ...]) -> Any:
        matmuls = self.partitions.local.matmuls
        while len(matmuls) > outstanding:
            oldest = matmuls.pop(0)
            oldest.result = oldest.compute()
        actual = tuple(x.result if isinstance(x, Pending) else x for x in deps)
        assert all(x is not None for x in actual), "result used before the matmul is waited for"
        return actual[0] if len(actual) == 1 else actual


def functions(modules: Sequence[ModuleType], names: dict[str, Any]) -> dict[str, Any]:
    """Return copies of a kernel's functions and constants that resolve globals in `names`."""
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, constexpr):
                names.setdefault(name, value.value)
            elif hasattr(value, "fn") and value.fn.__module__ == module.__name__:
                names[name] = FunctionType(value.fn.__code__, names, name)
    return names


def launcher(modules: Sequence[ModuleType], seed: int, programs: int) -> Callable[..., None]:
    """Return a replacement of `launch` that runs the programs of a grid sequentially.

    It raises AssertionError if the kernel violates a hardware rule, or writes an element twice.
    """

    def launch(
        kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any
    ) -> None:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        written = {id(x): torch.zeros(x.numel(), dtype=torch.int64) for x in tensors}
        seen = []
        for x in arguments:
            if isinstance(x, Tensor):
                seen.append(Pointer(x.view(-1), written[id(x)]))
            else:
                seen.append(Descriptor(x) if hasattr(x, "block_shape") else x)
        for program in range(programs):
            model = Model(program, programs, seed + program)
            functions(modules, model.namespace())[kernel.fn.__name__](*seen, **constants)
        assert all(counts.max() <= 1 for counts in written.values() if counts.numel()), (
            "written twice"
        )

    return launch
