"""Vocabulary-parallel cross-entropy: read the logits once, then overwrite them with gradients.

`vocab_statistics` reads the logits once and computes three numbers per token: the maximum, the sum
of exp(logit - maximum) (online, Milakov and Gimelshein 2018), and the logit of the label.
`combine_statistics` merges several such triples: those of the spans into which a row is split, and
those of the ranks. `vocab_gradient_` overwrites the logits with their gradient. In bf16 the total
memory traffic is 6 bytes per logit. There are no atomics, and every sum has a fixed order.

Shapes: N tokens, V vocabulary rows of this rank, P triples of the same token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels.dispatch import without_gradient
from megagrow_kernels.launching import FLOATS, architecture, blocks_of, launch, programs
from megagrow_kernels.tiles import select

FILL = 4
"""Programs per multiprocessor up to which rows are split, so that few rows still fill a device."""


@triton.jit
def _finite(maximum):
    """Return the value to subtract from logits: 0 if all are -inf, so that exp gives 0, not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit(do_not_specialize=["rows", "first"])
def _statistics_kernel(
    logits,
    labels,
    triples,
    rows,
    stride,
    first,
    real,
    span,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Reduce one span of one row.

    Every lane keeps its own maximum and sum over VECTOR logits at a time: one exp per logit, and
    threads communicate only at the end.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    logits += row.to(tl.int64) * stride
    begin = part * span
    end = tl.minimum(begin + span, real)
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    maximum = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(begin, end, LANES * VECTOR):
        columns = start + offsets
        # A span is a multiple of the tile, so only the end of the row needs the mask.
        x = tl.load(logits + columns, mask=columns < real, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(maximum, tl.max(x, 1))
        base = _finite(higher)
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        maximum = higher
    highest = tl.max(maximum, 0)
    total = tl.sum(total * tl.exp(maximum - _finite(highest)), 0)
    index = tl.load(labels + row) - first
    mine = (index >= begin) & (index < end)
    target = tl.load(logits + index, mask=mine, other=0.0).to(tl.float32)
    triples += part.to(tl.int64) * 3 * rows + row
    tl.store(triples, highest)
    tl.store(triples + rows, total)
    tl.store(triples + 2 * rows, target)


@triton.jit(do_not_specialize=["rows", "parts"])
def _combine_kernel(triples, out, rows, parts, BLOCK: tl.constexpr):
    """Combine the parts of BLOCK tokens: the maximum first, then sums in the order of the parts."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    maximum = tl.full((BLOCK,), float("-inf"), tl.float32)
    for part in range(parts):
        at = triples + part * 3 * rows.to(tl.int64) + row
        maximum = tl.maximum(maximum, tl.load(at, mask=inside, other=0.0))
    base = _finite(maximum)
    total = tl.zeros((BLOCK,), tl.float32)
    target = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        at = triples + part * 3 * rows.to(tl.int64) + row
        scale = tl.exp(tl.load(at, mask=inside, other=0.0) - base)
        total += tl.load(at + rows, mask=inside, other=0.0) * scale
        target += tl.load(at + 2 * rows, mask=inside, other=0.0)
    tl.store(out + row, maximum, mask=inside)
    tl.store(out + rows + row, total, mask=inside)
    tl.store(out + 2 * rows + row, target, mask=inside)


@triton.jit(do_not_specialize=["first"])
def _gradient_kernel(
    logits, labels, maximum, total, scale, z_scale, stride, first, width, real, BLOCK: tl.constexpr
):
    """Overwrite BLOCK columns of one row with their gradient."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row.to(tl.int64) * stride + columns
    highest, sum_of_exp = tl.load(maximum + row), tl.load(total + row)
    of_target = tl.load(scale + row)
    log_sum = highest + tl.log(sum_of_exp)
    # Not exp(logit - log_sum): rounding log_sum loses its smaller term.
    of_softmax = (of_target + 2 * tl.load(z_scale + row) * log_sum) / sum_of_exp
    index = tl.load(labels + row) - first
    x = tl.load(at, mask=columns < real, other=0.0).to(tl.float32)
    gradient = tl.exp(x - highest) * of_softmax - tl.where(columns == index, of_target, 0.0)
    tl.store(at, tl.where(columns < real, gradient, 0.0), mask=columns < width)


def vocab_statistics_forward(logits: Tensor, labels: Tensor, first: int, real: int) -> Tensor:
    """Run `vocab_statistics` without the custom op; also supports meta tensors."""
    _check(logits)
    rows, width = logits.shape
    tiles = select("vocab_statistics", architecture(logits.device), width=width)
    tile = tiles["LANES"] * tiles["VECTOR"]
    steps = max(1, blocks_of(real, tile))
    parallel = blocks_of(FILL * programs(logits.device), max(rows, 1))
    span = tile * blocks_of(steps, min(steps, parallel))
    parts = blocks_of(steps * tile, span)
    triples = logits.new_empty((parts, 3, rows), dtype=torch.float32)
    if rows > 0:
        launch(
            _statistics_kernel,
            (rows, parts),
            *(logits, labels, triples, rows, logits.stride(0), first, real, span),
            **tiles,
        )
    return triples[0] if parts == 1 else combine_statistics_forward(triples)


def combine_statistics_forward(triples: Tensor) -> Tensor:
    """Run `combine_statistics` without the custom op; also supports meta tensors."""
    parts, _, rows = triples.shape
    tiles = select("combine_statistics", architecture(triples.device))
    out = triples.new_empty((3, rows))
    if rows > 0:
        grid = (blocks_of(rows, tiles["BLOCK"]),)
        launch(_combine_kernel, grid, triples, out, rows, parts, **tiles)
    return out


def vocab_gradient_backward(
    logits: Tensor,
    labels: Tensor,
    maximum: Tensor,
    total: Tensor,
    scale: Tensor,
    z_scale: Tensor,
    first: int,
    real: int,
) -> None:
    """Run `vocab_gradient_` without the custom op; also supports meta tensors."""
    _check(logits)
    rows, width = logits.shape
    tiles = select("vocab_gradient", architecture(logits.device), width=width)
    if rows > 0:
        launch(
            _gradient_kernel,
            (rows, blocks_of(width, tiles["BLOCK"])),
            *(logits, labels, maximum, total, scale, z_scale),
            *(logits.stride(0), first, width, real),
            **tiles,
        )


_statistics_op = torch.library.custom_op(
    "megagrow::vocab_statistics", vocab_statistics_forward, mutates_args=()
)


@_statistics_op.register_fake
def _(logits: Tensor, labels: Tensor, first: int, real: int) -> Tensor:
    return logits.new_empty((3, logits.shape[0]), dtype=torch.float32)


_combine_op = torch.library.custom_op(
    "megagrow::combine_statistics", combine_statistics_forward, mutates_args=()
)


@_combine_op.register_fake
def _(triples: Tensor) -> Tensor:
    return triples.new_empty(triples.shape[1:])


_gradient_op = torch.library.custom_op(
    "megagrow::vocab_gradient", vocab_gradient_backward, mutates_args=("logits",)
)

_statistics = without_gradient(_statistics_op, vocab_statistics_forward)
_combine = without_gradient(_combine_op, combine_statistics_forward)
_gradient = without_gradient(_gradient_op, vocab_gradient_backward, mutates_first=True)


def vocab_statistics(logits: Tensor, labels: Tensor, first: int, real: int) -> Tensor:
    """Return one rank's contribution to the cross-entropy, from a single read of its logits.

    logits is (N, V) in bf16, fp16 or fp32, rows contiguous, for the vocabulary rows first..first+V,
    of which the first `real` are not padding; labels is (N,) int64, indices into the full
    vocabulary. Returns (3, N) fp32: the maximum (-inf if no row is real), the sum of exp(logit -
    maximum), and the logit of the label (0 if this rank does not hold it). Not differentiable;
    `vocab_gradient_` computes the gradient of the loss. Raises TypeError for other dtypes,
    ValueError for other shapes and strides.
    """
    return _statistics(logits, labels, first, real)


def combine_statistics(triples: Tensor) -> Tensor:
    """Combine the statistics of several ranks, (P, 3, N) fp32, into one triple per token, (3, N).

    Sums are taken in the order of the parts, so equal inputs give bitwise equal results on all
    ranks.
    """
    return _combine(triples)


def vocab_gradient_(
    logits: Tensor,
    labels: Tensor,
    maximum: Tensor,
    total: Tensor,
    scale: Tensor,
    z_scale: Tensor,
    first: int,
    real: int,
) -> None:
    """Overwrite logits (N, V) with the gradient of sum(scale * ce + z_scale * lse^2) over tokens.

    ce is the cross-entropy of a token and lse its log-sum-exp over the full vocabulary (z-loss,
    Chowdhery et al. 2022, section 5). maximum and total (N,) fp32 are those of all ranks. scale and
    z_scale (N,) fp32 are 0 for an ignored token, whose gradient is exactly 0; padding columns also
    get 0. The other arguments and the errors are those of `vocab_statistics`.
    """
    _gradient(logits, labels, maximum, total, scale, z_scale, first, real)


def _check(logits: Tensor) -> None:
    if logits.dtype not in FLOATS:
        raise TypeError(f"cross-entropy requires bf16, fp16 or fp32 logits, got {logits.dtype}")
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(
            f"cross-entropy requires logits (N, V) with contiguous rows, got shape "
            f"{tuple(logits.shape)}, strides {logits.stride()}"
        )
