"""Attention backward, in three kernels without atomics (Dao 2023, FlashAttention-2, algorithm 2).

With P the weights, recomputed from the saved logsumexp, and dO the gradient of the output O:

    delta = rowsum(dO O)
    dV = P^T dO
    dS = P (dO V^T - delta)
    dQ = scale dS K
    dK = scale dS^T Q

The queries kernel holds a block of queries and loops over keys for dQ. The keys kernel holds a
block of keys and loops over the queries of all heads that share it for dK and dV. Each sum is
computed by one program in a fixed order, so gradients are bitwise reproducible.
"""

from typing import Any

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
    own_queries,
    place,
    queries_step,
    query_rows,
    sees,
    store_edge,
)
from megagrow_kernels.launching import architecture, blocks_of, launch
from megagrow_kernels.tiles import select

DELTA_ELEMENTS, DELTA_WARPS = 8192, 8
"""Elements and warps per program of the delta kernel; more elements per warp spill registers."""


@triton.jit(do_not_specialize=["tokens"])
def _delta_kernel(
    out,
    grad,
    delta,
    tokens,
    out_stride,
    out_head_stride,
    grad_stride,
    grad_head_stride,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    head = tl.cast(tl.program_id(1), tl.int64)
    out += head * out_head_stride
    grad += head * grad_head_stride
    o_MD = load_edge(out, first, tokens, out_stride, ROWS, COLUMNS, HEAD_DIM).to(tl.float32)
    do_MD = load_edge(grad, first, tokens, grad_stride, ROWS, COLUMNS, HEAD_DIM).to(tl.float32)
    rows = first + tl.arange(0, ROWS)
    tl.store(delta + head * tokens + rows, tl.sum(o_MD * do_MD, 1), mask=rows < tokens)


@triton.jit(do_not_specialize=blocks.SIZES)
def _queries_kernel(
    q,
    k,
    v,
    grad,
    k_rows,
    v_rows,
    logsumexp,
    delta,
    dq,
    tiles,
    count,
    heads,
    at_once,
    tokens,
    window,
    sequence,
    hidden,
    scale,
    unscaled,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    grad_stride,
    grad_head_stride,
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
    head = tl.cast(head, tl.int64)
    k += tl.cast(group, tl.int64) * k_head_stride
    v += tl.cast(group, tl.int64) * v_head_stride
    q += head * q_head_stride
    grad += head * grad_head_stride
    queries = first + tl.arange(0, BLOCK_M)
    q_MD = load_edge(q, row, last_row, q_stride, BLOCK_M, COLUMNS, HEAD_DIM, lowest)
    do_MD = load_edge(grad, row, last_row, grad_stride, BLOCK_M, COLUMNS, HEAD_DIM, lowest)
    inside = between(rows, lowest, last_row)
    lse_M = tl.load(logsumexp + (head * tokens + rows), mask=inside, other=float("inf"))
    delta_M = tl.load(delta + (head * tokens + rows), mask=inside, other=0.0)
    dq_MD = tl.zeros([BLOCK_M, COLUMNS], tl.float32)

    low, edge, begin = key_range(first, start, window, BLOCK_M, BLOCK_N, EDGE_N, WINDOWED)
    for at in range(low, edge, BLOCK_N):
        k_ND = load_whole(k_rows, k, at, group, k_stride, BLOCK_N, COLUMNS, HEAD_DIM, DESCRIPTORS)
        v_ND = load_whole(v_rows, v, at, group, v_stride, BLOCK_N, COLUMNS, HEAD_DIM, DESCRIPTORS)
        dq_MD = queries_step(q_MD, do_MD, k_ND, v_ND, lse_M, delta_M, scale, True, dq_MD, False)
    for step in tl.range(begin, tl.minimum(first + BLOCK_M, end), EDGE_N, num_stages=2):
        at = edge_keys(step, low, edge, WINDOWED)
        k_ND = load_edge(k, at, end, k_stride, EDGE_N, COLUMNS, HEAD_DIM)
        v_ND = load_edge(v, at, end, v_stride, EDGE_N, COLUMNS, HEAD_DIM)
        keys = at + tl.arange(0, EDGE_N)
        seen = sees(queries[:, None], keys[None, :], window, True, WINDOWED)
        dq_MD = queries_step(q_MD, do_MD, k_ND, v_ND, lse_M, delta_M, scale, seen, dq_MD, True)
    dq += head * HEAD_DIM
    store_edge(dq, dq_MD * unscaled, row, last_row, heads * HEAD_DIM, HEAD_DIM, lowest)


@triton.jit
def _keys_step(
    k,
    v,
    q,
    do,
    logsumexp,
    delta,
    scale,
    seen,
    dk,
    dv,
    MASKED: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
):
    """Add the contribution of a block of queries to dk (unscaled) and dv; scores are (N, M)."""
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    weights = tl.exp2(scores * scale - logsumexp[None, :])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    if DV:
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
    if DK:
        d_weights = tl.dot(v, tl.trans(do), input_precision="ieee")
        d_scores = weights * (d_weights - delta[None, :])
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=blocks.SIZES)
def _keys_kernel(
    q,
    k,
    v,
    grad,
    q_rows,
    grad_rows,
    logsumexp,
    delta,
    dk,
    dv,
    tiles,
    count,
    groups,
    at_once,
    tokens,
    window,
    sequence,
    hidden,
    scale,
    unscaled,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    grad_stride,
    grad_head_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SUFFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
):
    first, _, end, group = place(tiles, count, groups, at_once, BLOCK_N, False)
    if first >= end:
        return
    wide_group = tl.cast(group, tl.int64)
    k += wide_group * k_head_stride
    v += wide_group * v_head_stride
    k_ND = load_edge(k, first, end, k_stride, BLOCK_N, COLUMNS, HEAD_DIM)
    v_ND = load_edge(v, first, end, v_stride, BLOCK_N, COLUMNS, HEAD_DIM)
    keys = first + tl.arange(0, BLOCK_N)
    dk_ND = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, COLUMNS], tl.float32)

    # Queries: first the keys' own tokens and the remainder from `tail` to `last`, both in parts of
    # EDGE_M; then the full blocks between them: those that the window hides from some keys, then
    # the others. A part must not reach from the keys' own tokens into a full block.
    tl.static_assert(BLOCK_N % EDGE_M == 0, "EDGE_M must divide BLOCK_N")
    last = end
    if WINDOWED:
        last = tl.minimum(end, first + BLOCK_N - 1 + window)
    offset, lowest, own, reach = 0, None, first, BLOCK_N
    if SUFFIX:
        offset, lowest = query_rows(end, sequence, hidden)
        own, reach = own_queries(first, last, offset + lowest, BLOCK_N, EDGE_M)
    after = first + reach
    blocks_between = tl.maximum(last - after, 0) // BLOCK_M
    tail = after + blocks_between * BLOCK_M
    in_band = tl.cdiv(tl.minimum(after, last) - own, EDGE_M)
    edges = in_band + tl.cdiv(tl.maximum(last - tail, 0), EDGE_M)
    for step in tl.range(0, edges * GROUP, num_stages=1):
        part = step % edges
        at = tl.where(part < in_band, own + part * EDGE_M, tail + (part - in_band) * EDGE_M)
        head = tl.cast(group * GROUP + step // edges, tl.int64)
        q_of, do_of = q + head * q_head_stride, grad + head * grad_head_stride
        row, last_row = at - offset, end - offset
        q_MD = load_edge(q_of, row, last_row, q_stride, EDGE_M, COLUMNS, HEAD_DIM, lowest)
        do_MD = load_edge(do_of, row, last_row, grad_stride, EDGE_M, COLUMNS, HEAD_DIM, lowest)
        queries, rows = at + tl.arange(0, EDGE_M), row + tl.arange(0, EDGE_M)
        inside = between(rows, lowest, last_row)
        lse_M = tl.load(logsumexp + (head * tokens + rows), mask=inside, other=float("inf"))
        delta_M = tl.load(delta + (head * tokens + rows), mask=inside, other=0.0)
        seen = sees(queries[None, :], keys[:, None], window, True, WINDOWED)
        dk_ND, dv_ND = _keys_step(
            k_ND, v_ND, q_MD, do_MD, lse_M, delta_M, scale, seen, dk_ND, dv_ND, True, DK, DV
        )
    for MASKED in tl.static_range(WINDOWED, -1, -1):
        begin, stop, count = after, tail, blocks_between
        if WINDOWED:
            clear = tl.minimum(tl.maximum(window - reach, 0) // BLOCK_M, blocks_between)
            if MASKED:
                begin, count = after + clear * BLOCK_M, blocks_between - clear
            else:
                stop, count = after + clear * BLOCK_M, clear
        at, head = begin, group * GROUP
        for _ in range(0, count * GROUP):
            wide, row = tl.cast(head, tl.int64), at - offset
            q_of, do_of = q + wide * q_head_stride, grad + wide * grad_head_stride
            q_MD = load_whole(
                q_rows, q_of, row, head, q_stride, BLOCK_M, COLUMNS, HEAD_DIM, DESCRIPTORS
            )
            do_MD = load_whole(
                grad_rows, do_of, row, head, grad_stride, BLOCK_M, COLUMNS, HEAD_DIM, DESCRIPTORS
            )
            queries, rows = at + tl.arange(0, BLOCK_M), row + tl.arange(0, BLOCK_M)
            lse_M = tl.load(logsumexp + wide * tokens + rows)
            delta_M = tl.load(delta + wide * tokens + rows)
            seen = True
            if MASKED:
                seen = sees(queries[None, :], keys[:, None], window, False, True)
            dk_ND, dv_ND = _keys_step(
                k_ND, v_ND, q_MD, do_MD, lse_M, delta_M, scale, seen, dk_ND, dv_ND, MASKED, DK, DV
            )
            head += at + BLOCK_M == stop
            at = tl.where(at + BLOCK_M == stop, begin, at + BLOCK_M)
    first = at - reach  # the same value, but the loops keep no registers for the rows stored
    stride = groups * HEAD_DIM
    if DK:
        store_edge(dk + wide_group * HEAD_DIM, dk_ND * unscaled, first, end, stride, HEAD_DIM)
    if DV:
        store_edge(dv + wide_group * HEAD_DIM, dv_ND, first, end, stride, HEAD_DIM)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query_tiles: Tensor,
    key_tiles: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q (B, Sq, H, D), k and v (B, Sk, G, D), each in its input's dtype.

    grad is the gradient of the output, (B, Sq, H, D). out and logsumexp are the results of
    `attention_forward`; the tiles belong to the same `Packing`. Raises LookupError if the tile
    table has no matching row.
    """
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    inputs = [blocks.flat(x) for x in (q, k, v, grad)]
    rows = (k.shape[1], k.shape[1] - q.shape[1])
    saved = (logsumexp, _delta(blocks.flat(out), inputs[3]))
    _launch_products(
        _queries_kernel, inputs, saved, gradients[:1], query_tiles, rows, scale, window
    )
    _launch_products(_keys_kernel, inputs, saved, gradients[1:], key_tiles, rows, scale, window)
    dq, dk, dv = gradients
    return dq, dk, dv


def _delta(out: Tensor, grad: Tensor) -> Tensor:
    """Return rowsum(dO O), (H, T) fp32."""
    tokens, heads, head_dim = out.shape
    columns = blocks.padded_columns(head_dim)
    rows = DELTA_ELEMENTS // columns
    delta = torch.empty(heads, tokens, dtype=torch.float32, device=out.device)
    launch(
        _delta_kernel,
        (blocks_of(tokens, rows), heads),
        *(out, grad, delta, tokens, *out.stride()[:2], *grad.stride()[:2]),
        HEAD_DIM=head_dim,
        COLUMNS=columns,
        ROWS=rows,
        num_warps=DELTA_WARPS,
    )
    return delta


def _launch_products(
    kernel: Any,
    inputs: list[Tensor],
    saved: tuple[Tensor, Tensor],
    gradients: list[Tensor],
    tiles: Tensor,
    rows: tuple[int, int],
    scale: float,
    window: int | None,
) -> None:
    """Launch the queries kernel, which loops over k and v, or the keys kernel, over q and grad.

    inputs is (q, k, v, grad), saved is (logsumexp, delta), rows is (keys of a row, those of its
    first tokens without queries). If two accumulators do not fit in
    registers, the tile table sets SEPARATE: the keys kernel then computes dk and dv in two
    launches, and the scores twice.
    """
    q, k, v, grad = inputs
    by_queries = kernel is _queries_kernel
    op = "attention_queries" if by_queries else "attention_keys"
    tile = select(op, architecture(q.device), head_dim=q.shape[2], bytes=q.element_size())
    resident, streamed = ("BLOCK_M", "BLOCK_N") if by_queries else ("BLOCK_N", "BLOCK_M")
    streams = (k, v) if by_queries else (q, grad)
    columns = blocks.padded_columns(q.shape[2])
    descriptors = [
        blocks.make_descriptor(x, tile[streamed], columns, tile["DESCRIPTORS"]) for x in streams
    ]
    parts = [{}] if by_queries else [{"DK": True, "DV": True}]
    if tile.get("SEPARATE"):
        tile = {name: value for name, value in tile.items() if name != "SEPARATE"}
        parts = [{"DK": True, "DV": False}, {"DK": False, "DV": True}]
    heads, tokens = gradients[0].shape[2], q.shape[0]
    at_once = blocks.concurrent_heads(streams[0], k.shape[1], heads)
    for part in parts:
        launch(
            kernel,
            blocks.grid(tiles, heads, tile[resident]),
            *(*inputs, *descriptors, *saved, *gradients, tiles, len(tiles), heads),
            *(at_once, tokens, min(window or 0, rows[0]), *rows, scale * blocks.LOG2_E, scale),
            *(x.stride(dim) for x in inputs for dim in (0, 1)),
            GROUP=q.shape[1] // k.shape[1],
            HEAD_DIM=q.shape[2],
            COLUMNS=columns,
            WINDOWED=window is not None,
            SUFFIX=rows[1] > 0,
            **tile,
            **part,
        )
