"""Gradients of ZeRO 1 and 2: fp32 sums in the layout of the optimizer's flat groups.

A hook on each parameter adds its gradient to a flat fp32 tensor as soon as autograd has finished
it, and frees it. No gradient in the dtype of the forward pass remains after its layer.

- ZeRO 1 sums all gradients of a rank over the micro-batches and reduces once per step, in the
  last backward pass.
- ZeRO 2 reduces in each backward pass, and sums only this rank's share.

Gradients are summed over ranks, not averaged; `FlatOptimizer` divides by the number of ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrow.parallel.bucket_reduction import (
    InPlaceReduction,
    Piece,
    Reduction,
    StagedReduction,
)
from megagrow.parallel.materialize import zeros


@dataclass(frozen=True)
class ReductionSettings:
    """Reduction of gradients over the data-parallel ranks."""

    group: dist.ProcessGroup
    dtype: torch.dtype
    """Dtype of communication."""
    bucket: int
    """Elements reduced at a time."""
    every_pass: bool
    """Reduce in each backward pass (ZeRO 2) instead of once per step (ZeRO 1)."""


@dataclass(frozen=True)
class _Placed:
    """Position of a parameter in a flat group."""

    parameter: nn.Parameter
    group: int
    start: int
    pieces: tuple[Piece, ...]

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()


class FlatGradients:
    """Accumulated gradients of flat groups, and this rank's reduced share of them.

    Args:
        groups: parameters of each flat group, in order.
        shares: elements of each group that one data-parallel rank owns.
        settings: the reduction.
        is_last: returns True during the last backward pass of a step.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        shares: Sequence[int],
        settings: ReductionSettings,
        is_last: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._shares = shares
        self._is_last = is_last
        self._rank, self.ranks = settings.group.rank(), settings.group.size()
        self._sharded = settings.every_pass and self.ranks > 1
        self._placed = [
            placed
            for index, (group, share) in enumerate(zip(groups, shares, strict=True))
            for placed in _place(group, index, share)
        ]
        self._flats: list[Tensor] = []
        self._reduction: Reduction | None = None
        self._index = {id(placed.parameter): index for index, placed in enumerate(self._placed)}
        self._late: set[int] = set()
        self._summed: set[int] = set()
        self._reduced: set[int] = set()
        self._complete: set[int] = set()
        self.hooks = [
            placed.parameter.register_post_accumulate_grad_hook(self._hook(index))
            for index, placed in enumerate(self._placed)
        ]

    def shares(self) -> list[Tensor]:
        """Return this rank's share of each group: (share,) fp32 views, sums after `finish`."""
        self._allocate()
        if self._sharded:
            return self._flats
        return [
            flat[self._rank * share : (self._rank + 1) * share]
            for flat, share in zip(self._flats, self._shares, strict=True)
        ]

    def parts(self) -> list[list[tuple[Any, Tensor]]]:
        """Return the non-empty part of each parameter in this rank's share, by group."""
        out: list[list[tuple[Any, Tensor]]] = [[] for _ in self._shares]
        shares = self.shares()
        for placed in self._placed:
            for piece in placed.pieces:
                if piece.owner == self._rank:
                    first = self._rank * self._shares[placed.group]
                    part = shares[placed.group][piece.start - first : piece.stop - first]
                    out[placed.group].append((placed.parameter, part))
        return out

    def expect_late(self, parameter: nn.Parameter) -> None:
        """Wait for `add_late` before a parameter's gradient is complete."""
        self._late.add(self._index[id(parameter)])

    def add_late(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a gradient that arrives after all backward passes of a step."""
        index = self._index[id(parameter)]
        self._add(index, gradient.detach(), completes=True)

    def finish(self) -> None:
        """Finish the reductions of a backward pass; call once per pass, on all ranks."""
        if self._reduction is not None:
            self._reduction.finish()
        self._reduced.clear()

    def finish_step(self) -> None:
        """Finish the gradients of a step; call once, after the last pass, on all ranks."""
        # A parameter without a gradient contributes zeros, not the values of an earlier step.
        for index in sorted(set(range(len(self._placed))) - self._complete):
            self._add(index, torch.zeros_like(self._placed[index].parameter), completes=True)
        self.finish()
        self._summed.clear()
        self._complete.clear()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def hook(parameter: Any) -> None:
            gradient, parameter.grad = parameter.grad, None
            completes = self._is_last() and index not in self._late
            self._add(index, gradient.detach(), completes)

        return hook

    def _add(self, index: int, gradient: Tensor, completes: bool) -> None:
        """Add a gradient; `completes` if it is the last one of the parameter in the step."""
        self._allocate()
        if completes:
            self._complete.add(index)
        placed, first = self._placed[index], index not in self._summed
        self._summed.add(index)
        if self._sharded:
            self._reduce(index, gradient.reshape(-1), first)
            return
        into = self._flats[placed.group][placed.start : placed.stop].view(gradient.shape)
        into.copy_(gradient) if first else into.add_(gradient)
        if completes:
            self._reduce(index, into.view(-1), first=True)

    def _reduce(self, index: int, gradient: Tensor, first: bool) -> None:
        if index in self._reduced:
            raise AssertionError("a parameter's gradient arrived twice in one backward pass")
        self._reduced.add(index)
        if self._reduction is None:
            return
        placed = self._placed[index]
        for piece in placed.pieces:
            part = gradient[piece.start - placed.start : piece.stop - placed.start]
            self._reduction.add(piece, part, first)

    def _allocate(self) -> None:
        """Allocate at the first use, so that a growth does not pay for it."""
        if self._flats:
            return
        device = self._placed[0].parameter.device
        times = 1 if self._sharded else self.ranks
        self._flats = [zeros(times * share, torch.float32, device) for share in self._shares]
        settings = self._settings
        if self.ranks == 1:
            return
        if self._sharded or settings.dtype != torch.float32:
            self._reduction = StagedReduction(
                self.shares(), settings.bucket, settings.dtype, settings.group
            )
        else:
            self._reduction = InPlaceReduction(self._flats, settings.bucket, settings.group)


def _place(group: Sequence[nn.Parameter], index: int, share: int) -> list[_Placed]:
    placed, start = [], 0
    for parameter in group:
        stop = start + parameter.numel()
        owners = range(start // share, -(-stop // share))
        pieces = tuple(
            Piece(owner, index, max(start, owner * share), min(stop, (owner + 1) * share))
            for owner in owners
        )
        placed.append(_Placed(parameter, index, start, pieces))
        start = stop
    return placed
