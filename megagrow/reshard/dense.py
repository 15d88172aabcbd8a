"""Resharding of dense terms: target parameters that are linear maps of full source matrices.

A target element needs full rows and columns of its sources. The weighted sum of a term's sources
commutes with sharding, so only that sum is gathered, one matrix at a time. Each rank then computes
its own blocks in fp64. Results of different layouts differ only in the fp32 rounding of the sum.

`mixtures` is the differentiable form used to train learned growth. Forward and backward take one
all-reduce each.
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
from megagrow.reshard.copy_plan import terms_of
from megagrow.reshard.exchange import BUCKET_BYTES, ShardedState, TransferStats, group_device
from megagrow.reshard.layout import Block, Layout

_ELEMENTS_AT_ONCE = BUCKET_BYTES // 8 // 4
"""Elements of one fp64 work matrix; up to four exist at a time."""


def exchange_dense(source: ShardedState, growth: GrowthMap, target: ShardedState) -> TransferStats:
    """Add the dense terms to this rank's target storage. Collective.

    Call after `exchange`, on storage that is zero except where other terms write. In addition to
    source and target, a rank holds one full parameter and one bucket.
    """
    sent = rounds = 0
    by_mix = _by_mix(source.layout, growth, target.layout)
    for (kind, read, sources, alphas), targets in by_mix.items():
        mix = _gathered(read, sources, alphas, source)
        sent, rounds = sent + _reduced_bytes(mix.nbytes, dist.get_world_size()), rounds + 1
        for name, term in targets:
            gain = None
            if term.gain is not None:
                gain = _gathered("fp32", (term.gain,), (1.0,), source)
                sent, rounds = sent + _reduced_bytes(gain.nbytes, dist.get_world_size()), rounds + 1
            _add_blocks(name, kind, term, mix, gain, target)
    return TransferStats(sent, sent if target.layout.pp > 1 else 0, bytes_local=0, rounds=rounds)


def dense_bytes(source: Layout, growth: GrowthMap, target: Layout) -> int:
    """Return the bytes each rank sends in `exchange_dense`, computed from the layouts."""
    reduced = []
    for (_, _, sources, _), targets in _by_mix(source, growth, target).items():
        gains = [term.gain for _, term in targets if term.gain is not None]
        reduced += [source.plan[name] for name in (sources[0], *gains)]
    world = target.world_size
    return sum(_reduced_bytes(4 * spec.rows * spec.cols, world) for spec in reduced)


_Mix = tuple[StateKind, StateKind, tuple[str, ...], tuple[float, ...]]


def _by_mix(
    source: Layout, growth: GrowthMap, target: Layout
) -> dict[_Mix, list[tuple[str, Dense]]]:
    """Group target parameters and their dense terms by the source sum they read."""
    by_mix: dict[_Mix, list[tuple[str, Dense]]] = {}
    for kind in growth.kinds:
        for name, term, read in terms_of(source, growth, target, kind):
            if isinstance(term, Dense):
                mix = (kind, read, term.sources, term.alphas)
                by_mix.setdefault(mix, []).append((name, term))
    return by_mix


def _gathered(
    kind: StateKind, sources: tuple[str, ...], alphas: tuple[float, ...], source: ShardedState
) -> Tensor:
    """Return the weighted sum of full source parameters on every rank: (rows, cols) fp32."""
    spec = source.layout.plan[sources[0]]
    full = torch.zeros(spec.rows, spec.cols, device=group_device())
    for alpha, name in zip(alphas, sources, strict=True):
        for part, held in held_parts(name, kind, full, source):
            part.add_(held, alpha=alpha)
    for part in full.view(-1).split(BUCKET_BYTES // 4):
        dist.all_reduce(part)
    return full


def _reduced_bytes(size: int, world: int) -> int:
    """Return the bytes each rank sends in a ring all-reduce of `size` bytes."""
    return 2 * size * (world - 1) // world


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
    """Yield row ranges of a block of left @ (mix * gain) @ right^T: fp32."""
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
    """Return rows of left @ mix in fp64; only parts of `mix` are converted at a time."""
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
    name: str, kind: StateKind, full: Tensor, source: ShardedState
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of `full` (rows, cols) with this rank's values for them, on its device.

    Replicated values are yielded by one rank only: the parts of all ranks tile the full tensor.
    """
    layout, rank = source.layout, dist.get_rank()
    if name not in source.storage or not layout.writes(name, rank):
        return
    stored = source.storage[name][kind]
    for block in layout.blocks(name, rank):
        place = layout.local(name, rank, block)
        rows, cols = (slice(span.start, span.stop) for span in block)
        yield full[rows, cols], block_view(stored, block, *place).to(full.device)


Names = Sequence[Sequence[str]]


def mixtures(factors: Tensor, names: Names, source: ShardedState) -> list[Tensor]:
    """Return the sum over j of factors[row, j] * weights(names[row][j]) for each row of names.

    `factors` is (rows, sources); all names of a row have one shape. The mixtures are full logical
    tensors (rows, cols) in the dtype of `factors`, views of one buffer, equal on all ranks.
    Collective, forward and backward.

    The gradient of `factors` is this rank's partial sum: summed over all ranks it is the gradient
    of the sum of all ranks' losses.
    """
    return _matrices(_Mixture.apply(factors, names, source), names, source.layout)


class _Mixture(torch.autograd.Function):
    """Autograd function of `mixtures`: one all-reduce forward, one backward."""

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
