"""Micro-batches of training steps, read one step ahead of the training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from megagrow.common.background import BackgroundCall
from megagrow.config.schema import BatchConfig
from megagrow.data.batches import Batch, Reader, read_micro_batches
from megagrow.data.stage_streams import StreamPlace
from megagrow.errors import InputError
from megagrow.model.ops import Ops
from megagrow.parallel.context.shards import SequenceShard, shard_of
from megagrow.parallel.process_groups import Topology

CLOSE_SECONDS = 5.0
"""Time at the end of a run for a read to finish; a read that hangs ends with the process."""


@dataclass(frozen=True)
class StepPart:
    """This rank's part of the global batch of one step, which determines its micro-batches."""

    place: StreamPlace
    """Place of the global batch in the training data."""
    batch: BatchConfig
    dp_rank: int
    dp: int
    pack: Callable[[Tensor], Any]
    """`Ops.pack` of the model."""
    device: torch.device
    shard: SequenceShard
    """Part of each sequence."""

    @classmethod
    def of(cls, place: StreamPlace, batch: BatchConfig, topology: Topology, ops: Ops) -> "StepPart":
        """Return the part of this rank."""
        rank, ranks = topology.batch_rank, topology.batch_ranks
        return cls(place, batch, rank, ranks, ops.pack, topology.device, shard_of(topology))

    def read(self, reader: Reader[StreamPlace]) -> list[Batch]:
        """Read the micro-batches; their tensors are pinned if the device is a GPU."""
        micro_batches = read_micro_batches(reader, self.place, self.batch, self.dp_rank, self.dp)
        packed = [batch.packed(self.pack).sharded(self.shard.of) for batch in micro_batches]
        if self.device.type == "cpu":
            return packed
        # Of this thread; pinned memory belongs to its context.
        torch.get_device_module(self.device).set_device(self.device)
        return [batch.pin_memory() for batch in packed]


@dataclass(frozen=True)
class Vote:
    """Vote of one rank on a step before it is trained."""

    part: StepPart
    problem: InputError | OSError | None = None
    """Error because of which the rank cannot train the step."""
    stopped: bool = False
    """The rank has received a signal."""
    busy: bool = False
    """The rank works in the background."""
    due: bool = False
    """The clock of rank 0 requests a checkpoint before the step; False on the other ranks."""

    @property
    def flags(self) -> list[bool]:
        """Flags that are combined over all ranks, in the order of the fields of `Agreement`."""
        return [self.problem is not None, self.stopped, self.busy, self.due]

    def raise_problem(self) -> None:
        """Raise the rank's error, if any."""
        if self.problem is not None:
            raise self.problem


@dataclass(frozen=True)
class Agreement:
    """Votes of all ranks on a step; a flag is set if it is set on any rank."""

    vote: Vote
    """Vote of this rank."""
    failed: bool
    stopped: bool
    busy: bool
    due: bool


class StepFeed:
    """Reader of this rank's micro-batches; a context manager.

    A single thread reads the next step while the current one is trained. The data is a function
    of the place, so a prefetched step that is not the next one to be trained is discarded.
    """

    def __init__(self, reader: Reader[StreamPlace]) -> None:
        self._reader = reader
        self._part: StepPart | None = None
        self._call: BackgroundCall[list[Batch]] | None = None
        self.agreement: Agreement | None = None
        """Votes on the next step, if the ranks have already voted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._call is not None:
            self._call.join(CLOSE_SECONDS)

    def prefetch(self, part: StepPart) -> None:
        """Start to read a step, unless it is being read or has been read."""
        if part == self._part:
            return
        if self._call is not None:
            self._call.join()
        self._part = part
        self._call = BackgroundCall(lambda: part.read(self._reader), name="next batch")
        self._call.start()

    def read(self, part: StepPart) -> list[Batch]:
        """Return this rank's micro-batches of a step. They are kept until the next `prefetch`.

        Raises:
            DataError: the stream cannot be read.
        """
        self.prefetch(part)
        assert self._call is not None
        return self._call.result()
