"""Dense terms: target parameters that mix whole source parameters, one after the other.

A target element needs whole rows and columns of its sources. The mix of a term's sources commutes
with sharding, so it alone is gathered, one matrix; each rank then computes the blocks that it
holds, in fp64, which makes them the same on every layout to the rounding of the mix in fp32.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.growth.map import Dense, GrowthMap
from megagrow.parallel.sharding import StateKind
from megagrow.reshard.copy_ops import block_view
from megagrow.reshard.exchange import BUCKET_BYTES, ShardedState, TransferStats
from megagrow.reshard.layout import Block, Layout
from megagrow.reshard.transport import group_device

_ELEMENTS_AT_ONCE = BUCKET_BYTES // 8 // 4
"""Of an fp64 matrix on the way; there are up to four at a time."""


def exchange_dense(source: ShardedState, growth: GrowthMap, target: ShardedState) -> TransferStats:
    """Adds what dense terms make to this rank's target storage; all ranks together.

    To be called after `exchange`, on storage that is zero where nothing else comes to. Besides
    source and target a rank holds one whole parameter and one bucket.
    """
    sent = rounds = 0
    for (kind, sources, alphas), targets in _by_mix(growth, target.layout).items():
        mix = _gathered(kind, sources, alphas, source)
        sent, rounds = sent + _reduced_bytes(mix.nbytes, dist.get_world_size()), rounds + 1
        for name, term in targets:
            gain = None
            if term.gain is not None:
                gain = _gathered("fp32", (term.gain,), (1.0,), source)
                sent, rounds = sent + _reduced_bytes(gain.nbytes, dist.get_world_size()), rounds + 1
            _add_blocks(name, kind, term, mix, gain, target)
    return TransferStats(bytes_sent=sent, bytes_local=0, rounds=rounds)


def dense_bytes(source: Layout, growth: GrowthMap, target: Layout) -> int:
    """What each rank sends in `exchange_dense`, by the layouts alone."""
    reduced = []
    for (_, sources, _), targets in _by_mix(growth, target).items():
        gains = [term.gain for _, term in targets if term.gain is not None]
        reduced += [source.plan[name] for name in (sources[0], *gains)]
    world = target.dp * target.tp
    return sum(_reduced_bytes(4 * spec.rows * spec.cols, world) for spec in reduced)


_Mix = tuple[StateKind, tuple[str, ...], tuple[float, ...]]


def _by_mix(growth: GrowthMap, target: Layout) -> dict[_Mix, list[tuple[str, Dense]]]:
    """Target parameters and their dense terms, those together that read the same mix."""
    found: dict[_Mix, list[tuple[str, Dense]]] = {}
    for kind in growth.kinds:
        for name in target.plan:
            for term in growth.terms(name, kind):
                if isinstance(term, Dense):
                    mix = (kind, term.sources, term.alphas)
                    found.setdefault(mix, []).append((name, term))
    return found


def _gathered(
    kind: StateKind, sources: tuple[str, ...], alphas: tuple[float, ...], source: ShardedState
) -> Tensor:
    """The weighted sum of whole source parameters, on every rank: (rows, cols) fp32."""
    spec = source.layout.plan[sources[0]]
    whole = torch.zeros(spec.rows, spec.cols, device=group_device())
    for alpha, name in zip(alphas, sources, strict=True):
        for part, held in held_parts(name, kind, whole, source):
            part.add_(held, alpha=alpha)
    for part in whole.view(-1).split(BUCKET_BYTES // 4):
        dist.all_reduce(part)
    return whole


def _reduced_bytes(whole: int, world: int) -> int:
    """What each rank of a ring sends to reduce a tensor of `whole` bytes on all of them."""
    return 2 * whole * (world - 1) // world


def _add_blocks(
    name: str, kind: StateKind, term: Dense, mix: Tensor, gain: Tensor | None, target: ShardedState
) -> None:
    rank, layout = dist.get_rank(), target.layout
    for block in layout.blocks(name, rank):
        for rows, values in _pieces(term, mix, gain, block.rows, block.cols):
            place = layout.local(name, rank, Block(rows, block.cols))
            view = block_view(target.storage[name][kind], Block(rows, block.cols), *place)
            view.add_(values.to(view.device))


def _pieces(
    term: Dense, mix: Tensor, gain: Tensor | None, rows: range, cols: range
) -> Iterator[tuple[range, Tensor]]:
    """A block of left @ (mix * gain) @ right^T, some rows at a time: fp32."""
    factors = None
    if gain is not None:
        factors = gain.double().view(-1) ** term.gain_power
        factors = torch.where(gain.view(-1) == 0, 0.0, factors)
    at_once = max(1, _ELEMENTS_AT_ONCE // max(*mix.shape, len(cols)))
    for first in range(rows.start, rows.stop, at_once):
        part = range(first, min(first + at_once, rows.stop))
        values = _left(term.left, mix, part, at_once)
        if factors is not None:
            values = values * factors
        if term.right is None:
            values = values[:, cols.start : cols.stop]
        else:
            values = values @ _fp64(term.right, cols, mix.device).T
        yield part, values.float()


def _left(left: np.ndarray | None, mix: Tensor, rows: range, at_once: int) -> Tensor:
    """Some rows of left @ mix, in fp64; the mix is never in fp64 as a whole."""
    if left is None:
        return mix[rows.start : rows.stop].double()
    wide = _fp64(left, rows, mix.device)
    total = torch.zeros(len(rows), mix.shape[1], dtype=torch.float64, device=mix.device)
    for first in range(0, mix.shape[0], at_once):
        total.addmm_(wide[:, first : first + at_once], mix[first : first + at_once].double())
    return total


def _fp64(matrix: np.ndarray, rows: range, device: torch.device) -> Tensor:
    return torch.from_numpy(matrix[rows.start : rows.stop]).to(device, torch.float64)


def held_parts(
    name: str, kind: StateKind, whole: Tensor, source: ShardedState
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of `whole` (rows, cols) and, on its device, what this rank holds of them, as views.

    Of numbers that several ranks hold only one has them: the parts of all ranks make the whole.
    """
    layout, rank = source.layout, dist.get_rank()
    if name not in source.storage or not layout.writes(name, rank):
        return
    stored = source.storage[name][kind]
    for block in layout.blocks(name, rank):
        place = layout.local(name, rank, block)
        rows, cols = (slice(span.start, span.stop) for span in block)
        yield whole[rows, cols], block_view(stored, block, *place).to(whole.device)


Names = Sequence[Sequence[str]]


def mixtures(factors: Tensor, names: Names, source: ShardedState) -> list[Tensor]:
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
    def forward(ctx: Any, factors: Tensor, names: Names, source: ShardedState) -> Tensor:
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
