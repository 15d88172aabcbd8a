"""Attention forward: online softmax in one pass over the keys (Dao 2023, FlashAttention-2).

A program processes a block of queries of one head. It first visits the blocks of earlier keys,
which all its queries see, then the keys at the edges: those that a window hides from some queries,
and those of its own tokens, where the causal mask applies. Key/value heads are shared by H / G
query heads and read in place. In addition to the output, the kernel stores each query's log-sum-exp
for the backward pass. All exponentials and logarithms are to base 2: the hardware has exp2, and
log2(e) is folded into the scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagrow_kernels import attention_blocks as blocks
from megagrow_kernels.attention_blocks import (
    between,
    edge_keys,
    key_range,
    load_edge,
    load_whole,
    place,
    query_rows,
    sees,
    store_edge,
)
from megagrow_kernels.attention_hopper import attention_hopper_forward, fits
from megagrow_kernels.launching import architecture, launch
from megagrow_kernels.tiles import select


@triton.jit
def _weigh(q, k, scale, seen, maximum, MASKED: tl.constexpr):
    """Return the weights of a block of keys, the updated maxima, and the factor for earlier sums.

    With a mask, a query may not have seen any key yet: its maximum is -inf, and is treated as 0.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    risen = tl.maximum(maximum, tl.max(scores, 1) * scale)
    shift = risen
    if MASKED:
        shift = tl.where(risen == float("-inf"), 0.0, risen)
    return tl.exp2(scores * scale - shift[:, None]), risen, tl.exp2(maximum - shift)


@triton.jit
def _add(weights, v, shrink, acc, total):
    """Return the accumulators (acc, total) updated with a block of values."""
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total


@triton.jit(do_not_specialize=blocks.SIZES)
def _forward_kernel(
    q,
    k,
    v,
    k_rows,
    v_rows,
    out,
    logsumexp,
    tiles,
    count,
    heads,
    at_once,
    tokens,
    window,
    sequence,
    hidden,
    scale,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SUFFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    first, start, end, head = place(tiles, count, heads, at_once, BLOCK_M, True)
    if first >= end:
        return
    offset, lowest = 0, None
    if SUFFIX:
        offset, lowest = query_rows(end, sequence, hidden)
        if first - offset + BLOCK_M <= lowest:
            return
    row, last_row = first - offset, end - offset
    rows = row + tl.arange(0, BLOCK_M)
    group = head // GROUP
    k += tl.cast(group, tl.int64) * k_head_stride
    v += tl.cast(group, tl.int64) * v_head_stride
    q += tl.cast(head, tl.int64) * q_head_stride
    q_MD = load_edge(q, row, last_row, q_stride, BLOCK_M, COLUMNS, HEAD_DIM, lowest)
    queries = first + tl.arange(0, BLOCK_M)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)

    low, edge, begin = key_range(first, start, window, BLOCK_M, BLOCK_N, EDGE_N, WINDOWED)
    for at in range(low, edge, BLOCK_N):
        k_ND = load_whole(k_rows, k, at, group, k_stride, BLOCK_N, COLUMNS, HEAD_DIM, DESCRIPTORS)
        weights, maximum, shrink = _weigh(q_MD, k_ND, scale, True, maximum, False)
        v_ND = load_whole(v_rows, v, at, group, v_stride, BLOCK_N, COLUMNS, HEAD_DIM, DESCRIPTORS)
        acc, total = _add(weights, v_ND, shrink, acc, total)
    for step in tl.range(begin, tl.minimum(first + BLOCK_M, end), EDGE_N, num_stages=2):
        at = edge_keys(step, low, edge, WINDOWED)
        k_ND = load_edge(k, at, end, k_stride, EDGE_N, COLUMNS, HEAD_DIM)
        keys = at + tl.arange(0, EDGE_N)
        seen = sees(queries[:, None], keys[None, :], window, True, WINDOWED)
        weights, maximum, shrink = _weigh(q_MD, k_ND, scale, seen, maximum, True)
        v_ND = load_edge(v, at, end, v_stride, EDGE_N, COLUMNS, HEAD_DIM)
        acc, total = _add(weights, v_ND, shrink, acc, total)

    out += tl.cast(head, tl.int64) * HEAD_DIM
    store_edge(out, acc / total[:, None], row, last_row, heads * HEAD_DIM, HEAD_DIM, lowest)
    logsumexp += tl.cast(head, tl.int64) * tokens
    inside = between(rows, lowest, last_row)
    tl.store(logsumexp + rows, maximum + tl.log2(total), mask=inside)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, query_tiles: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return attention (B, Sq, H, D) in q's dtype and logsumexp (H, B * Sq), fp32, to base 2.

    q is (B, Sq, H, D), the queries of the last Sq of Sk tokens; k and v are (B, Sk, G, D), all of
    one dtype; query_tiles is `Packing.query_tiles`. logsumexp is log2 of the sum over keys of
    2^(scale log2(e) q k). window limits attention to that many tokens, the query included. Raises
    LookupError if the tile table has no matching row.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    heads, head_dim = q.shape[2:]
    q_THD, k_TGD, v_TGD = (blocks.flat(x) for x in (q, k, v))
    tokens, groups = q_THD.shape[0], k_TGD.shape[1]
    sequence, hidden = k.shape[1], k.shape[1] - q.shape[1]
    logsumexp = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    capability = architecture(q.device)
    tile = select(
        "attention_forward",
        capability,
        head_dim=head_dim,
        bytes=q.element_size(),
        hopper=fits(capability, head_dim, q.dtype) and not hidden,
    )
    if tile.get("GENERATION", 1) == 2:
        return attention_hopper_forward(q, k, v, query_tiles, scale, window, tile["STAGES"])
    columns = blocks.padded_columns(head_dim)
    rows = [
        blocks.make_descriptor(x, tile["BLOCK_N"], columns, tile["DESCRIPTORS"])
        for x in (k_TGD, v_TGD)
    ]
    launch(
        _forward_kernel,
        blocks.grid(query_tiles, heads, tile["BLOCK_M"]),
        *(q_THD, k_TGD, v_TGD, *rows, out, logsumexp, query_tiles),
        *(
            len(query_tiles),
            heads,
            blocks.concurrent_heads(k_TGD, groups, heads),
            tokens,
            min(window or 0, sequence),
            sequence,
            hidden,
        ),
        scale * blocks.LOG2_E,
        *(x.stride(dim) for x in (q_THD, k_TGD, v_TGD) for dim in (0, 1)),
        GROUP=heads // groups,
        HEAD_DIM=head_dim,
        COLUMNS=columns,
        WINDOWED=window is not None,
        SUFFIX=hidden > 0,
        **tile,
    )
    return out, logsumexp
