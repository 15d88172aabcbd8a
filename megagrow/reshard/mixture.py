"""Mixtures of source parameters, made whole on every rank, with gradients for their factors.

The source stays where it lies. Each rank adds up what it holds of the mixture, at its place, and
one sum over all ranks makes it whole. On the way back the gradients of all ranks are summed, and
each rank finds the part of the factors' gradients that its own numbers account for.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.reshard.exchange import Side
from megagrow.reshard.layout import Layout
from megagrow.reshard.whole import held_parts

Names = Sequence[Sequence[str]]


def mixtures(factors: Tensor, names: Names, source: Side) -> list[Tensor]:
    """For each row of names the sum over j of factors[row, j] * the weights of names[row][j].

    `factors` is (rows, sources); all names of a row have one shape. The mixtures are whole logical
    tensors (rows, cols) in the type of the factors, views of one piece of memory, equal on all
    ranks, which call this together, also when they go backward.

    The gradient of the factors is this rank's part of it: the parts add up, over all ranks, to the
    gradient of the sum of all ranks' losses.
    """
    return _matrices(_Mixture.apply(factors, names, source), names, source.layout)


class _Mixture(torch.autograd.Function):
    """Forward and backward each are one sum over all ranks."""

    @staticmethod
    def forward(ctx: Any, factors: Tensor, names: Names, source: Side) -> Tensor:
        ctx.names, ctx.source, ctx.shape = names, source, factors.shape
        specs = [source.layout.plan[row[0]] for row in names]
        flat = factors.new_zeros(sum(spec.rows * spec.cols for spec in specs))
        mixed = _matrices(flat, names, source.layout)
        for matrix, row, scales in zip(mixed, names, factors.tolist(), strict=True):
            for name, scale in zip(row, scales, strict=True):
                for part, held in held_parts(name, "fp32", matrix, source) if scale else ():
                    part.add_(held, alpha=scale)
        dist.all_reduce(flat)
        return flat

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        parts = grad.new_zeros(ctx.shape, dtype=torch.float64)
        mixed = _matrices(grad, ctx.names, ctx.source.layout)
        for index, (matrix, row) in enumerate(zip(mixed, ctx.names, strict=True)):
            for j, name in enumerate(row):
                for part, held in held_parts(name, "fp32", matrix, ctx.source):
                    parts[index, j] += (part * held).sum(dtype=torch.float64)
        return parts.to(grad.dtype), None, None


def _matrices(flat: Tensor, names: Names, layout: Layout) -> list[Tensor]:
    specs = [layout.plan[row[0]] for row in names]
    pieces = flat.split([spec.rows * spec.cols for spec in specs])
    return [p.view(spec.rows, spec.cols) for p, spec in zip(pieces, specs, strict=True)]
