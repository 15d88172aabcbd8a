"""A model of Gluon on one Hopper multiprocessor, for kernels that no GPU is here to run.

It executes a kernel's own functions, under a `gl` whose tensors are torch's, with a thread for each
partition of warps. What is asynchronous on the card is as late here as it can be: a TMA load
poisons its destination at once and lands at any later time; a wgmma reads its operands when it is
issued, to see that they are there, and again when it is waited for. Which partition goes on after
each step at a barrier, and when a load lands, is drawn at random from a seed. So a kernel that
overwrites, reads or returns something too early shows NaN, and one that waits for ever is a
Deadlock. Layouts, warps within a partition and the memory proxies are not modelled.
"""

import random
import threading
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.language import constexpr


POISON = 0x7FDA
"""A NaN, in fp16 as in bf16, that no arithmetic gives: shared memory that nothing wrote."""


class Deadlock(Exception):
    """Every partition waits for a barrier, and nothing is on its way."""


class Pending:
    """What an asynchronous matmul will give; no tensor until it is waited for."""

    def __init__(self, a: Any, b: "Memory", accumulator: Tensor | None) -> None:
        self.a, self.b, self.accumulator = a, b, accumulator
        self.result: Tensor | None = None
        self.compute()

    def compute(self) -> Tensor:
        for operand in (self.a, self.b):
            assert not (isinstance(operand, Memory) and operand.poisoned), "matmul of nothing"
        a = self.a.data if isinstance(self.a, Memory) else self.a
        product = a.float() @ self.b.data.float()
        return product if self.accumulator is None else self.accumulator + product


class Barrier:
    """An mbarrier: a phase ends when all arrived and all expected bytes landed."""

    def __init__(self) -> None:
        self.count, self.left, self.bytes, self.phase = 0, 0, 0, 0

    def step(self) -> None:
        assert self.left >= 0, "more arrive at a barrier than it was made for"
        if self.left == 0 and self.bytes == 0:
            self.left = self.count
            self.phase += 1

    def passed(self, parity: int) -> bool:
        return self.phase & 1 != parity


class Memory:
    """Shared memory, or a view of it; a NaN of its own until written. Of int64: barriers."""

    def __init__(self, data: Any, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype
        self.shape = tuple(data.shape) if isinstance(data, Tensor) else (len(data), 1)

    @property
    def poisoned(self) -> bool:
        return bool((self.data.view(torch.int16) == POISON).any())

    def poison(self) -> None:
        self.data.view(torch.int16).fill_(POISON)

    def index(self, i: int) -> Any:
        assert 0 <= int(i) < self.shape[0]
        return Memory(self.data[i], self.dtype) if isinstance(self.data, Tensor) else self.data[i]

    def slice(self, start: int, length: int) -> "Memory":
        return Memory(self.data[start : start + length], self.dtype)

    def load(self, _: None) -> Tensor:
        assert not self.poisoned, "read before it is there"
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)

    def permute(self, order: tuple[int, ...]) -> "Memory":
        return Memory(self.data.permute(order), self.dtype)


class Pointer:
    """Elements of a contiguous tensor by their offsets; remembers how often each was written."""

    def __init__(self, flat: Tensor, written: Tensor, offset: Any = 0) -> None:
        self.flat, self.written, self.offset = flat, written, offset
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.flat, self.written, self.offset + more)

    def load(self) -> Tensor:
        assert 0 <= int(self.offset) < self.flat.numel()
        return self.flat[self.offset]

    def store(self, value: Tensor, mask: Tensor) -> None:
        assert value.dtype == self.flat.dtype
        offset, value, mask = torch.broadcast_tensors(self.offset, value, mask)
        self.written.index_add_(0, offset[mask], torch.ones_like(offset[mask]))
        self.flat[offset[mask]] = value[mask]


class Descriptor:
    """A TMA descriptor of a matrix: blocks of it, zero beyond its end."""

    def __init__(self, real: Any) -> None:
        self.matrix, self.dtype, self.layout = real.base, real.base.dtype, real.layout
        rows, columns = real.block_shape
        nbytes = rows * columns * real.base.element_size()
        self.block_type = SimpleNamespace(shape=(rows, columns), nbytes=nbytes)

    def block(self, corner: list[Any]) -> Tensor:
        (rows, columns), (top, left) = self.block_type.shape, (int(x) for x in corner)
        assert top >= 0 and 0 <= left <= self.matrix.shape[1] - columns
        part = self.matrix[top : top + rows, left : left + columns]
        return torch.nn.functional.pad(part, (0, 0, 0, rows - part.shape[0]))


class Partitions:
    """Runs partitions as threads of which one at a time goes on, chosen at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.baton = threading.Condition()
        self.turn: int | None = None
        self.ready: dict[int, Callable[[], bool]] = {}
        self.loads: list[Callable[[], None]] = []
        self.failure: BaseException | None = None
        self.local = threading.local()

    def run(self, partitions: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        self.ready = {i: lambda: True for i in range(len(partitions))}
        threads = [
            threading.Thread(target=self._partition, args=(i, *each), daemon=True)
            for i, each in enumerate(partitions)
        ]
        for thread in threads:
            thread.start()
        with self.baton:
            self._pass_on()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        assert not self.loads, "a load is on its way when the kernel ends"

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Lets others go on, and this partition not before the condition holds."""
        self.ready[self.local.number] = condition
        self._pass_on()
        self._await_turn()

    def _await_turn(self) -> None:
        me = self.local.number
        self.baton.wait_for(lambda: self.turn == me or self.failure is not None)
        if self.failure is not None:
            raise SystemExit

    def _pass_on(self) -> None:
        while True:
            able = [i for i, condition in self.ready.items() if condition()]
            choice = self.random.randrange(max(len(able) + len(self.loads), 1))
            if choice < len(able):
                self.turn = able[choice]
            elif self.loads:
                self.loads.pop(choice - len(able))()
                continue
            elif self.ready:
                self.failure = Deadlock(f"partitions {sorted(self.ready)} wait for ever")
            self.baton.notify_all()
            return

    def _partition(self, number: int, body: Callable[..., None], arguments: Any) -> None:
        self.local.number, self.local.matmuls = number, []
        with self.baton:
            try:
                self._await_turn()
                body(*arguments)
                assert not self.local.matmuls, "a matmul is running when its partition ends"
            except SystemExit:
                return
            except BaseException as error:
                self.failure = error
                self.baton.notify_all()
                return
            del self.ready[number]
            self._pass_on()


class Model:
    """What stands for Gluon's functions within a kernel, for one program of a grid."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.partitions = Partitions(seed)
        self.program, self.programs = torch.tensor(program), torch.tensor(programs)

    def namespace(self) -> dict[str, Any]:
        """What a kernel's module imports from Gluon, by the names of attention_hopper."""
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

    def warp_specialize(self, partitions: list[Any], warps: list[int], registers: list[int]) -> None:
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

    def load_tile(self, source: Descriptor, corner: list[Any], barrier: Barrier, to: Memory) -> None:
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
        found = tuple(x.result if isinstance(x, Pending) else x for x in deps)
        assert all(x is not None for x in found), "used while the matmul is still running"
        return found[0] if len(found) == 1 else found


def functions(modules: Sequence[ModuleType], names: dict[str, Any]) -> dict[str, Any]:
    """A kernel's functions and constants, once more, such that they see `names` as theirs."""
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, constexpr):
                names.setdefault(name, value.value)
            elif hasattr(value, "fn") and value.fn.__module__ == module.__name__:
                names[name] = FunctionType(value.fn.__code__, names, name)
    return names


def launcher(modules: Sequence[ModuleType], seed: int, programs: int) -> Callable[..., None]:
    """Stands for `launch` where a kernel is started: runs the grid's programs one after another.

    Raises AssertionError where the kernel breaks a rule of the machine, or writes an element twice.
    """

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any) -> None:
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
        assert all(counts.max() <= 1 for counts in written.values() if counts.numel()), "twice"

    return launch
