"""The gate between the steps of a contestant: it trains when it is its turn, and says what it took.

Every rank of every contestant is a process with a gate, which talks with the benchmark through a
local socket. So all contestants are there at once, one of them trains at a time, and they take
turns: what else the machine does meets all of them alike.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Connection
from typing import Any, Protocol


@dataclass(frozen=True)
class Turn:
    """Some steps in a row, as one rank saw them."""

    steps: int
    wall: float
    """Seconds."""
    cpu: float
    """Seconds of all threads of the process, in user and system mode."""


@dataclass(frozen=True)
class Case:
    """What one contestant trains. All contestants have the same model, batch, precision (fp32),
    optimizer (fused AdamW, clipped gradients) and threads in all."""

    contestant: str
    ranks: int
    threads: int
    """Of one rank."""
    model: dict[str, int]
    sequence: int
    batch: int
    """Sequences of a step, over all ranks and micro batches."""
    micro: int
    turns: tuple[int, ...]
    """Steps of each turn; the first turn is one step, the start."""
    corpus: str
    folder: str
    """For whatever it writes."""
    address: str
    """Of the benchmark's socket."""
    zero_stage: int = 1

    @property
    def steps(self) -> int:
        """Of all turns."""
        return sum(self.turns)

    @property
    def accumulation(self) -> int:
        """Micro batches of a rank in a step."""
        return self.batch // (self.micro * self.ranks)

    def as_json(self) -> dict[str, Any]:
        """Plain values, as `from_json` takes them."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Case":
        """The inverse of `as_json`."""
        return Case(**values | {"turns": tuple(values["turns"])})


class Boundary(Protocol):
    """What a contestant calls before its first step and after each of its steps."""

    def __call__(self) -> None: ...


class Gate:
    """Waits before each turn, and tells what it took after it. A `Boundary`."""

    def __init__(self, case: Case, rank: int, extra: Callable[[], Any] = lambda: None) -> None:
        """`extra` is asked after each turn for what else is to be told."""
        self._connection: Connection = Client(case.address)
        self._connection.send((case.contestant, rank))
        self._turns = list(case.turns)
        self._extra = extra
        self._left = 0
        self._begin: tuple[float, float] | None = None
        self._length = 0

    def __call__(self) -> None:
        if self._left > 0:
            self._left -= 1
        if self._left > 0:
            return
        if self._begin is not None:
            wall, cpu = time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]
            turn = asdict(Turn(self._length, wall, cpu))
            self._connection.send({"at": time.time(), "turn": turn, "extra": self._extra()})
            self._begin = None
        if self._turns:
            self._length = self._left = self._turns.pop(0)
            self._connection.recv()
            self._begin = time.perf_counter(), time.process_time()
