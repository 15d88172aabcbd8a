"""Differentiable collectives, named by their forward and backward operation.

f and g are the conjugate pair of Megatron-LM (Shoeybi et al. 2019, section 3); the sequence forms
are those of Korthikanti et al. 2022, section 4.2.2. Hidden states are (B, S, D); the sequence forms
split dimension 1. Every function is the identity on a group of one rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ProcessGroup = dist.ProcessGroup


def _all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _reduce_scatter_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    if x.device.type == "cpu":  # gloo has no reduce-scatter: all-reduce and keep this rank's part
        return _all_reduce(x, group).chunk(group.size(), dim=1)[group.rank()].contiguous()
    parts = [part.contiguous() for part in x.chunk(group.size(), dim=1)]
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts, group=group)
    return out


class _CopyForwardReduceBackward(torch.autograd.Function):
    """Megatron's f: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _ReduceForwardCopyBackward(torch.autograd.Function):
    """Megatron's g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherForwardScatterBackward(torch.autograd.Function):
    """f under sequence parallelism: all-gather forward, reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter_sequence(grad, ctx.group), None


class _ScatterForwardGatherBackward(torch.autograd.Function):
    """g under sequence parallelism: reduce-scatter forward, all-gather backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather_sequence(grad, ctx.group), None


def copy_to_tensor_parallel(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return x; its gradient is summed over the group."""
    return _CopyForwardReduceBackward.apply(x, group)


def reduce_from_tensor_parallel(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of x over the group; the gradient is unchanged."""
    return _ReduceForwardCopyBackward.apply(x, group)


def gather_from_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Gather (B, S/tp, D) to (B, S, D)."""
    return _GatherForwardScatterBackward.apply(x, group)


def scatter_to_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Reduce-scatter partial sums (B, S, D) to this rank's (B, S/tp, D)."""
    return _ScatterForwardGatherBackward.apply(x, group)
