"""Stateful parts of the Hopper multiprocessor model; see `gluon_model.py`."""

import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

POISON = 0x7FDA
"""Bits of a NaN, in fp16 and bf16, that no arithmetic produces: marks unwritten shared memory."""


class Deadlock(Exception):
    """Raised if every partition waits for a barrier and no operation is in flight."""


class Pending:
    """Result of an asynchronous matmul; not a tensor until it is waited for."""

    def __init__(self, a: Any, b: "Memory", accumulator: Tensor | None) -> None:
        self.a, self.b, self.accumulator = a, b, accumulator
        self.result: Tensor | None = None
        self.compute()

    def compute(self) -> Tensor:
        for operand in (self.a, self.b):
            assert not (isinstance(operand, Memory) and operand.poisoned), (
                "matmul operand is not written"
            )
        a = self.a.data if isinstance(self.a, Memory) else self.a
        product = a.float() @ self.b.data.float()
        return product if self.accumulator is None else self.accumulator + product


class Barrier:
    """An mbarrier: a phase completes when all arrivals and all expected bytes are counted."""

    def __init__(self) -> None:
        self.count, self.left, self.bytes, self.phase = 0, 0, 0, 0

    def step(self) -> None:
        assert self.left >= 0, "more arrivals at a barrier than its count"
        if self.left == 0 and self.bytes == 0:
            self.left = self.count
            self.phase += 1

    def passed(self, parity: int) -> bool:
        return self.phase & 1 != parity


class Memory:
    """Shared memory, or a view of it; NaN until written. int64 memory holds barriers."""

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
        assert not self.poisoned, "read before it is written"
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)

    def permute(self, order: tuple[int, ...]) -> "Memory":
        return Memory(self.data.permute(order), self.dtype)


class Pointer:
    """Elements of a contiguous tensor by offset; counts the writes of each element."""

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
    """A TMA descriptor of a matrix: loads blocks, with zeros beyond its end."""

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
    """Run partitions as threads, one at a time, chosen at random."""

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
        assert not self.loads, "a load is in flight at the end of the kernel"

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Yield to other partitions until the condition holds."""
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
                assert not self.local.matmuls, "a matmul is in flight at the end of its partition"
            except SystemExit:
                return
            except BaseException as error:
                self.failure = error
                self.baton.notify_all()
                return
            del self.ready[number]
            self._pass_on()
