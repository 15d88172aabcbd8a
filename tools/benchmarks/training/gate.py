"""Gate between the training steps of a benchmark configuration: waits for a turn and measures it.

Each rank of each configuration is a process with a gate that is connected to the benchmark by a
local socket. All configurations run at the same time, and one of them trains at a time. Turns are
short, so that other load on the machine affects all of them equally.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client, Connection
from typing import Any, Protocol


@dataclass(frozen=True)
class Turn:
    """Consecutive steps, measured by one rank."""

    steps: int
    wall: float
    """Seconds."""
    cpu: float
    """Seconds of all threads of the process, user and system time."""


@dataclass(frozen=True)
class TrainingCase:
    """Workload of one configuration.

    All configurations have the same model, batch, precision (fp32), optimizer (fused AdamW, clipped
    gradients) and total number of threads.
    """

    configuration: str
    ranks: int
    threads: int
    """Threads of one rank."""
    model: dict[str, int]
    sequence: int
    batch: int
    """Sequences per step, over all ranks and micro-batches."""
    micro: int
    turns: tuple[int, ...]
    """Steps of each turn; the first turn is one step and measures the start."""
    corpus: str
    folder: str
    """Folder of all outputs."""
    address: str
    """Address of the benchmark's socket."""
    zero_stage: int = 1

    @property
    def steps(self) -> int:
        """Steps of all turns."""
        return sum(self.turns)

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and step."""
        return self.batch // (self.micro * self.ranks)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "TrainingCase":
        """Build a case from the result of `as_json`."""
        return TrainingCase(**values | {"turns": tuple(values["turns"])})


class Boundary(Protocol):
    """Callback before the first step and after each step of a configuration."""

    def __call__(self) -> None: ...


class Gate:
    """Boundary that waits before each turn and reports its measurements afterwards."""

    def __init__(
        self, case: TrainingCase, rank: int, extra: Callable[[], Any] = lambda: None
    ) -> None:
        """Connect to the benchmark; `extra` returns further values to report after a turn."""
        self._connection: Connection = Client(case.address)
        self._connection.send((case.configuration, rank))
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
