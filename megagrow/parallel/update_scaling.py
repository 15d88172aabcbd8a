"""Factors within an optimizer's update: skipping, clipping, averaging, new and old entries.

Clipping and averaging are one divisor of the gradient in torch's fused update. The global norm has
a weight per optimizer group, norm^2 = sum over groups of weight * |g|^2: with the weights
k_out / k_in a grown model's norm equals that of its source (docs/reference/operators.md).

Old and new entries of a grown tensor share one flat tensor, one optimizer group and one step, so a
separate learning rate is a factor on the update: w = before + factor * (w - before). AdamW's weight
decay is part of the update, so a factor f equals a learning rate of f * lr, and a factor of 0
leaves the bits unchanged.

torch's optimizer hooks around `step` apply it inside DeepSpeed's step, before the weights are
copied to the forward weights.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def squared_norm(
    groups: Iterable[tuple[Sequence[tuple[Any, Tensor]], float]],
    tp_rank: int,
    device: torch.device,
) -> Tensor:
    """Return the squared L2 norm of ((parameter, gradient) pairs, weight) groups on this rank.

    A parameter replicated on all tensor-parallel ranks counts on the first one only.
    """
    total = torch.zeros((), device=device)
    for pairs, weight in groups:
        mine = [
            gradient for parameter, gradient in pairs if tp_rank == 0 or parameter.model_parallel
        ]
        if mine:
            total += weight * torch.nn.utils.get_total_norm(mine).square()
    return total


@dataclass(frozen=True)
class StepLimits:
    """Loss, in nats, and gradient norm before clipping above which an update is skipped."""

    loss: float
    norm: float


class StepGate:
    """Decision on the device whether an update is skipped; the host does not wait for it."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._limits: StepLimits | None = None
        self.norm: Tensor | None = None
        """Norm of the last step with limits."""
        self.exceeded: Tensor | None = None
        """(), fp32, 1 if the last step with limits exceeded one; the same on all ranks."""

    def set(self, loss: Tensor, limits: StepLimits | None) -> None:
        """Set loss () and limits of the next update; None skips only non-finite norms."""
        self._loss, self._limits = loss, limits
        self.norm = self.exceeded = None

    @property
    def limited(self) -> bool:
        """True if the next update has limits."""
        return self._limits is not None

    def skips(self, norm: Tensor) -> Tensor:
        """Return () bool, True if the update is skipped, given the global gradient norm ().

        Collective if there are limits: an update that exceeds them on one rank is skipped on all.
        """
        skipped = norm.isfinite().logical_not()
        if self._limits is None or self._loss is None:
            return skipped
        high = (norm.double() > self._limits.norm) | (self._loss > self._limits.loss)
        self.norm, self.exceeded = norm, high.float()
        dist.all_reduce(self.exceeded, op=dist.ReduceOp.MAX)
        return skipped | self.exceeded.bool()


def clip_in_update(
    optimizer: torch.optim.Optimizer, norm: Tensor, ranks: int, limit: float, skips: Tensor
) -> None:
    """Clip and average in the next update, which changes nothing if `skips`, () bool, is True.

    Gradients are sums over `ranks`; `norm` is that of their average. A `limit` of 0 disables
    clipping. The host does not wait for the norm.
    """
    divisor = norm.new_full((), ranks)
    if limit:
        divisor = divisor * ((norm + 1e-6) / limit).clamp(min=1.0)
    device = optimizer.param_groups[0]["params"][0].device
    scaled: Any = optimizer  # the protocol of torch.amp.GradScaler
    scaled.grad_scale = divisor.to(device)
    scaled.found_inf = skips.float().to(device)


@dataclass(frozen=True)
class ScaledPart:
    """Part of an optimizer tensor that belongs to one parameter, with its mask of new entries."""

    values: Tensor
    """(n,), a view of the optimizer's tensor."""
    new: Tensor | None
    """(n,), bool; None if all entries are old."""


class UpdateScaler:
    """Factors on the updates of all new and of all old entries of an optimizer.

    While a factor differs from 1, a step needs memory for a copy of the tensors that are updated
    together (under ZeRO 1 and 2, one group of this rank's shard). Otherwise there is no cost.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._new = 1.0
        self._old = 1.0
        self._parts: dict[Tensor, list[ScaledPart]] | None = None
        self._before: list[tuple[ScaledPart, Tensor]] = []
        optimizer.register_step_pre_hook(self._keep)
        optimizer.register_step_post_hook(self._blend)

    def register(self, parts: Iterable[tuple[Tensor, ScaledPart]]) -> None:
        """Register the parts of the optimizer's tensors: (tensor, part) for each parameter.

        Elements outside all parts (padding) are updated normally.
        """
        self._parts = {}
        for owner, part in parts:
            self._parts.setdefault(owner, []).append(part)

    def set(self, new: float, old: float) -> None:
        """Set the factors of the following steps."""
        if self._parts is None and not new == old == 1:
            raise AssertionError("update factors require registered parts; call register first")
        self._new, self._old = new, old

    def _keep(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._parts is None or self._new == self._old == 1:
            return
        updated = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        parts = [part for tensor in updated for part in self._parts.get(tensor, ())]
        touched = [part for part in parts if part.new is not None or self._old != 1]
        self._before = [(part, part.values.clone()) for part in touched]

    def _blend(self, *_: Any) -> None:
        # lerp returns its end points exactly at 0 and 1.
        for part, before in self._before:
            if part.new is None:
                before.lerp_(part.values, self._old)
            else:
                before.lerp_(part.values, torch.where(part.new, self._new, self._old))
            part.values.copy_(before)
        self._before = []
