"""Differentiable collectives, named by their forward and backward operation.

f and g are the conjugate pair of Megatron-LM (Shoeybi et al. 2019, section 3); the sequence forms
are those of Korthikanti et al. 2022, section 4.2.2. Hidden states are (B, S, D); the sequence forms
split dimension 1. Every function is the identity on a group of one rank. Context parallelism uses
the gather of the sequence forms and the exchange, over its own group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ProcessGroup = dist.ProcessGroup


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the tensors of all ranks of a group, stacked along a new first dimension."""
    out = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out.view(group.size(), *x.shape)


def _all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _gather_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    return gather(x, group).transpose(0, 1).flatten(1, 2)  # a view for a single sequence


def _reduce_scatter_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    if x.device.type == "cpu":  # gloo's reduce-scatter is not faster than its all-reduce
        return _all_reduce(x, group).chunk(group.size(), dim=1)[group.rank()].contiguous()
    return _reduce_scatter_tensor(x, group)


def _reduce_scatter_tensor(x: Tensor, group: ProcessGroup) -> Tensor:
    parts = x.unflatten(1, (group.size(), -1)).transpose(0, 1)
    out = x.new_empty(parts.shape[1:])
    # Contiguous is a view for a single sequence.
    dist.reduce_scatter_tensor(out, parts.contiguous().flatten(0, 1), group=group)
    return out


class _CopyForwardReduceBackward(torch.autograd.Function):
    """Megatron's f: identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Not in place: autograd may pass the same gradient to other functions.
        return _all_reduce(grad, ctx.group), None


class _ReduceForwardCopyBackward(torch.autograd.Function):
    """Megatron's g: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        if (x.is_leaf and ctx.needs_input_grad[0]) or x._is_view() or not x.is_contiguous():
            return _all_reduce(x, group)  # autograd or NCCL does not permit to overwrite it
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

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


class _Exchange(torch.autograd.Function):
    """All-to-all in the forward and in the backward pass: it is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


def copy_to_tensor_parallel(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return x; its gradient is summed over the group."""
    return _CopyForwardReduceBackward.apply(x, group)


def reduce_from_tensor_parallel(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of x over the group; the gradient is unchanged.

    x is overwritten where autograd permits it. Outputs of matrix products, which are not needed in
    the backward pass, always permit it.
    """
    return _ReduceForwardCopyBackward.apply(x, group)


def sum_of_partial(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of x over the group; its gradient is summed over the group as well.

    For partial results that every rank uses in its own slice: their gradients are partial, too.
    """
    return copy_to_tensor_parallel(reduce_from_tensor_parallel(x, group), group)


def gather_from_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Gather (B, S/tp, D) to (B, S, D)."""
    return _GatherForwardScatterBackward.apply(x, group)


def scatter_to_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """Reduce-scatter partial sums (B, S, D) to this rank's (B, S/tp, D)."""
    return _ScatterForwardGatherBackward.apply(x, group)


def exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """Send x[i] to rank i of the group and return the received tensors, stacked by sender."""
    return _Exchange.apply(x, group)
