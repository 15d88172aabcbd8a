"""Building blocks of the attention kernels: work assignment, row access and masks.

Legend: T tokens of all concatenated rows, H query heads, G key/value heads, D head dimension. A
program processes one block of one document and one head. Blocks are counted from the start of their
document, so a document's result does not depend on the other documents of its batch, bit for bit.
Tokens are positions among the concatenated keys. With SUFFIX, only the last tokens of each row have
queries, whose rows `query_rows` converts from tokens.
Rows that may be past the end of a document are accessed by masked pointers, so that no row of
another document is ever touched; rows inside it are read by descriptors (TMA) if the tile table
enables them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megagrow_kernels.launching import power_of_2
from megagrow_kernels.packing import TILE

LOG2_E = 1.4426950408889634
CACHE_BYTES = 24 * 2**20
"""Share of the L2 cache (40 to 60 MB on sm_80 and sm_90) for the tensors that are read repeatedly.
It limits the number of concurrent heads.
"""

SIZES = ("count", "at_once", "tokens", "window", "sequence", "hidden")
"""Arguments of the kernels whose values must not cause a compilation."""

_TILE = tl.constexpr(TILE)


@triton.jit
def place(tiles, count, heads, at_once, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Return a program's work: (first token of its block, start and end of the document, head).

    `at_once` heads run concurrently, through the tiles in list order. Blocks that share a tile run
    in order, or in reverse with LAST_FIRST; blocks past the end have first >= end.
    """
    split: tl.constexpr = _TILE // BLOCK
    turn = tl.program_id(0) // (count * split * at_once)
    within = tl.program_id(0) - turn * (count * split * at_once)
    width = tl.minimum(at_once, heads - turn * at_once)
    block = within // width
    part = block % split
    if LAST_FIRST:
        part = split - 1 - part
    tile = tiles + block // split * 3
    first = tl.load(tile) + part * BLOCK
    return first, tl.load(tile + 1), tl.load(tile + 2), turn * at_once + within % width


@triton.jit
def query_rows(end, sequence, hidden):
    """Return (offset, lowest) of the row of keys that holds the document which ends at `end`.

    A row of `sequence` keys has queries for all but its first `hidden` tokens. The query of token t
    is row t - offset of the concatenated queries, and the first one of this row is `lowest`.
    """
    row = (end - 1) // sequence
    return (row + 1) * hidden, row * (sequence - hidden)


@triton.jit
def own_queries(first, last, earliest, BLOCK_N: tl.constexpr, EDGE_M: tl.constexpr):
    """Return (own, reach): where a block of keys starts its own tokens' and the later queries.

    Queries begin at `earliest`, and end before `last`. The own tokens' queries start at `own`, in
    whole parts of EDGE_M; the later ones at first + reach, at `earliest` if it is later.
    """
    skipped = tl.maximum(earliest - first, 0)
    reach = tl.maximum(skipped, BLOCK_N)
    own = tl.where(skipped < BLOCK_N, first + skipped // EDGE_M * EDGE_M, first + reach)
    return tl.minimum(own, last), reach


@triton.jit
def key_range(
    first,
    start,
    window,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Return (low, edge, begin): ranges of the keys visible to the queries from `first`.

    low..edge are full blocks that all queries see. They start at multiples of BLOCK_N from `start`,
    the first token of the document. The keys from `edge` on need the causal mask; `edge` is before
    `first` unless BLOCK_N divides BLOCK_M. The loop over the keys that need a mask, in parts of
    EDGE_N, starts at `begin`; `edge_keys` returns its keys.
    """
    tl.static_assert(BLOCK_N % EDGE_N == 0, "EDGE_N must divide BLOCK_N")
    edge = first  # the same value, without a register of its own
    if BLOCK_M % BLOCK_N != 0:
        edge = start + (first - start) // BLOCK_N * BLOCK_N
    low, begin = start, edge
    if WINDOWED:
        lowest = start + tl.maximum(first - window + 1 - start, 0) // EDGE_N * EDGE_N
        partly_seen = tl.maximum(first + BLOCK_M - window - start, 0)
        low = tl.minimum(start + tl.cdiv(partly_seen, BLOCK_N) * BLOCK_N, edge)
        begin = edge - (low - lowest)
    return low, edge, begin


@triton.jit
def edge_keys(step, low, edge, WINDOWED: tl.constexpr):
    """Return the first key of a part that needs a mask.

    Steps before `edge` are the keys before `low`, which the window hides from some queries.
    """
    at = step
    if WINDOWED:
        at = tl.where(step < edge, step - edge + low, step)
    return at


@triton.jit
def pointers(base, at, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return pointers (ROWS, COLUMNS) to the rows from `at` of a matrix of row stride `stride`."""
    corner = base + tl.cast(at, tl.int64) * stride
    return corner + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def between(rows, low, end):
    """Return the mask of `rows` that are before `end`, and not before `low` unless it is None."""
    inside = rows < end
    if low is not None:
        inside = inside & (rows >= low)
    return inside


@triton.jit
def within(at, low, end, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Return a mask (ROWS, COLUMNS) of the rows from `at` that are `between` low and end.

    Padding columns are masked.
    """
    inside = between(at + tl.arange(0, ROWS), low, end)[:, None]
    return inside & (tl.arange(0, COLUMNS) < HEAD_DIM)[None, :]


@triton.jit
def load_edge(
    base,
    at,
    end,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    low=None,
):
    """Load the rows from `at`, with zeros before `low`, from `end` on and in padding columns."""
    inside = within(at, low, end, ROWS, COLUMNS, HEAD_DIM)
    return tl.load(pointers(base, at, stride, ROWS, COLUMNS), mask=inside, other=0.0)


@triton.jit
def store_edge(base, value, at, end, stride, HEAD_DIM: tl.constexpr, low=None):
    """Store the rows from `at` that are `between` low and end, without padding columns."""
    ROWS: tl.constexpr = value.shape[0]
    COLUMNS: tl.constexpr = value.shape[1]
    inside = within(at, low, end, ROWS, COLUMNS, HEAD_DIM)
    where = pointers(base, at, stride, ROWS, COLUMNS)
    tl.store(where, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_whole(
    rows,
    base,
    at,
    head,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Load rows of a head from `at`, all of them valid.

    Uses `rows`, the descriptor of all heads, or pointers from `base`, the head's first row.
    """
    if DESCRIPTORS:
        block = rows.load([at, head, 0]).reshape(ROWS, COLUMNS)
    elif HEAD_DIM == COLUMNS:
        block = tl.load(pointers(base, at, stride, ROWS, COLUMNS))
    else:
        real = (tl.arange(0, COLUMNS) < HEAD_DIM)[None, :]
        block = tl.load(pointers(base, at, stride, ROWS, COLUMNS), mask=real, other=0.0)
    return block


@triton.jit
def sees(queries, keys, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Return the broadcast mask of visible (query, key) pairs of tokens of one document.

    A query sees no later key, and none that is `window` or more tokens before it. CAUSAL and
    WINDOWED disable a condition that always holds.
    """
    if CAUSAL and WINDOWED:
        seen = (keys <= queries) & (keys > queries - window)
    elif CAUSAL:
        seen = keys <= queries
    else:
        seen = keys > queries - window
    return seen


@triton.jit
def queries_step(q, do, k, v, logsumexp, delta, scale, seen, dq, MASKED: tl.constexpr):
    """Add the contribution of a block of keys to dq, without the scale."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights = tl.exp2(scores * scale - logsumexp[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    d_weights = tl.dot(do, tl.trans(v), input_precision="ieee")
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, dq, input_precision="ieee")


def flat(x: Tensor) -> Tensor:
    """Return x (B, S, heads, D) as (T, heads, D) in a layout readable by descriptors.

    Descriptors need contiguous rows and 16-byte alignment of the base and the strides. A view if x
    satisfies this, a copy otherwise.
    """
    tokens = x.flatten(0, 1)
    token, head, element = tokens.stride()
    size = x.element_size()
    if element == 1 and (token * size | head * size | tokens.data_ptr()) % 16 == 0:
        return tokens
    return tokens.clone(memory_format=torch.contiguous_format)


def make_descriptor(
    x: Tensor, rows: int, columns: int, descriptors: int
) -> TensorDescriptor | Tensor:
    """Return a descriptor of x (T, heads, D), or x itself if `descriptors` is 0.

    Its blocks are `rows` tokens of one head, padded to `columns`.
    """
    if not descriptors:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, columns])


def padded_columns(head_dim: int) -> int:
    """Return the columns of a block: a power of two of at least 16, as matrix instructions need."""
    return max(16, power_of_2(head_dim))


def grid(tiles: Tensor, heads: int, block: int) -> tuple[int]:
    """Return the launch grid for `place`: one program per block of each tile and head.

    Raises ValueError unless block divides TILE.
    """
    if TILE % block:
        raise ValueError(f"attention block of {block} tokens does not divide a tile of {TILE}")
    return (len(tiles) * (TILE // block) * heads,)


def concurrent_heads(stream: Tensor, groups: int, heads: int) -> int:
    """Return the number of concurrent heads, out of `heads` in `groups` that share their streams.

    A group streams two tensors like `stream` (T, its heads, D). The result is the largest number of
    complete groups whose streams fit in the cache.
    """
    bytes_of_group = 2 * stream.numel() * stream.element_size() // groups
    return min(groups, max(1, CACHE_BYTES // bytes_of_group)) * (heads // groups)
