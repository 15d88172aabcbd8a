"""Execution of a pipeline schedule on one rank, and the transfers between pipeline ranks."""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.parallel.pipeline.schedule import Pass, Timeline
from megagrow.parallel.process_groups import Topology

Forward = Callable[[Pass, Tensor | None], Tensor]
"""(pass, hidden states or None for the first chunk) -> hidden states, or the loss of the last
chunk."""

AtSlot = Callable[[int, int], None]
"""(slot, number of slots)."""

Backward = Callable[[Pass, Tensor], None]
"""(pass, scalar) -> backward pass from the scalar: a loss, or one that stands for the output."""


class _Kept(NamedTuple):
    """Forward pass whose backward pass has not run."""

    read: Tensor | None
    """Hidden states that the chunk read."""
    scalar: Tensor
    gradient: list[Tensor]
    """Gradient of the output, once it has arrived."""


class PipelineRun:
    """One execution of a schedule.

    Args:
        line: the schedule.
        topology: this rank.
        shape: shape of the hidden states between chunks.
        dtype: their dtype.
    """

    def __init__(
        self, line: Timeline, topology: Topology, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self._line, self._rank = line, topology.pp_rank
        self._last = max(each.chunk for row in line for each in row if each is not None)
        self._links = _Links(topology, shape, dtype)

    def execute(
        self,
        forward: Forward,
        backward: Backward | None = None,
        at_slot: AtSlot = lambda slot, slots: None,
    ) -> None:
        """Run all passes of this rank in order. Collective over the pipeline ranks.

        `at_slot` is called at the begin of each slot of the schedule, also where this rank idles.
        """
        kept: dict[tuple[int, int], _Kept] = {}
        slots = self._line[self._rank]
        for slot, each in enumerate(slots):
            at_slot(slot, len(slots))
            sent: Tensor | None = None
            if each is not None and each.is_forward:
                sent = self._forward(each, forward, kept if backward is not None else None)
            elif each is not None and backward is not None:
                sent = self._backward(each, backward, kept.pop(each[1:]))
            self._links.exchange([row[slot] for row in self._line], sent, self._last)
        self._links.finish()

    def _forward(
        self, each: Pass, forward: Forward, kept: dict[tuple[int, int], _Kept] | None
    ) -> Tensor | None:
        """Run a forward pass and return what the next chunk reads."""
        received = None if each.chunk == 0 else self._links.take(each)
        if received is not None and kept is not None:
            received.requires_grad_()
        output, gradient = forward(each, received), list[Tensor]()
        if kept is not None:
            is_loss = each.chunk == self._last
            scalar = output if is_loss else _GradientLater.apply(output, gradient)
            kept[each[1:]] = _Kept(received, scalar, gradient)
        return None if each.chunk == self._last else output.detach()

    def _backward(self, each: Pass, backward: Backward, kept: _Kept) -> Tensor | None:
        """Run a backward pass and return the gradient of what the chunk read."""
        if each.chunk != self._last:
            kept.gradient.append(self._links.take(each))
        backward(each, kept.scalar)
        return None if kept.read is None else kept.read.grad


class _Links:
    """Transfers between neighboring pipeline ranks.

    All transfers of a slot are one batch, so that no rank waits for one that waits for it
    (`schedule.timeline`). A rank waits for a transfer only where it reads the result, and for the
    oldest of more than `pp` sends: gloo does not report which ones are complete.
    """

    def __init__(self, topology: Topology, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._group, self._rank, self._ranks = topology.pp_group, topology.pp_rank, topology.pp
        self._shape, self._dtype, self._device = shape, dtype, topology.device
        self._received: dict[Pass, tuple[Tensor, TransferBatch]] = {}
        self._sent: deque[tuple[Tensor, TransferBatch]] = deque()

    def exchange(self, now: list[Pass | None], sent: Tensor | None, last: int) -> None:
        """Send the result of this rank's pass, and start to receive those of the others."""
        operations, coming = [], {}
        for rank, each in enumerate(now):
            reader = None if each is None else _reader(each, last)
            if reader is None:
                continue
            target = reader.chunk % self._ranks
            if rank == self._rank:
                assert sent is not None
                sent = self._checked(sent)
                operations.append(self._operation(dist.isend, sent, target))
            elif target == self._rank:
                coming[reader] = torch.empty(self._shape, dtype=self._dtype, device=self._device)
                operations.append(self._operation(dist.irecv, coming[reader], rank))
        if not operations:
            return
        batch = TransferBatch(operations)
        self._received |= {reader: (tensor, batch) for reader, tensor in coming.items()}
        if sent is not None:
            self._sent.append((sent, batch))
        while self._sent and (self._sent[0][1].is_completed() or len(self._sent) > self._ranks):
            self._sent.popleft()[1].wait()

    def take(self, reader: Pass) -> Tensor:
        """Return the tensor that a pass reads; waits until it has arrived."""
        tensor, batch = self._received.pop(reader)
        batch.wait()
        return tensor

    def finish(self) -> None:
        """Wait for all sends."""
        for _, batch in self._sent:
            batch.wait()
        self._sent.clear()

    def _checked(self, tensor: Tensor) -> Tensor:
        if tensor.shape != self._shape or tensor.dtype != self._dtype:
            found, wanted = (
                f"{tuple(tensor.shape)} {tensor.dtype}",
                f"{self._shape} {self._dtype}",
            )
            raise AssertionError(f"hidden states are {found}, the next chunk expects {wanted}")
        return tensor.contiguous()

    def _operation(self, kind: Any, tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self._group, group_peer=peer)


class TransferBatch:
    """Transfers that were started together."""

    def __init__(self, operations: list[dist.P2POp]) -> None:
        self._works = dist.batch_isend_irecv(operations)

    def is_completed(self) -> bool:
        """Return True if all transfers are known to be complete."""
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Wait for all transfers; on a GPU only the current stream waits."""
        for work in self._works:
            work.wait()
        self._works = []  # gloo would wait for another message


def _reader(each: Pass, last: int) -> Pass | None:
    """Return the pass of another rank that reads the result of a pass."""
    chunk = each.chunk + (1 if each.is_forward else -1)
    return each._replace(chunk=chunk) if 0 <= chunk <= last else None


class _GradientLater(torch.autograd.Function):
    """Scalar whose backward pass begins with a gradient of the output that is known by then.

    The gradient of the scalar is ignored: the scale of the loss is in the other one already. The
    output itself is not kept.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None
