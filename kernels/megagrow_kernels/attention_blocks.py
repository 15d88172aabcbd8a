"""What the attention kernels share: where a program works, how it reads rows, which pairs count.

Legend: T tokens of all rows laid end to end, H query heads, G key/value heads, D head dimension.
A program has one block of one document and one head. Blocks are counted from the start of their
document, so a document's numbers do not depend on what it is packed with, to the bit. What may lie
past the end of a document is read and written by pointers under a mask, so that no row of another
document is ever touched; what lies within it is read by descriptors (TMA) where the table says so.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megagrow_kernels.packing import TILE

LOG2_E = 1.4426950408889634
CACHE_BYTES = 24 * 2**20
"""How much of the second-level cache (40 to 60 MB on sm_80 and sm_90) the side of attention that is
read again and again may fill: so many heads run side by side."""

_TILE = tl.constexpr(TILE)


@triton.jit
def place(tiles, count, heads, at_once, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Where a program works: (first token of its block, start and end of the document, head).

    `at_once` heads run side by side, through the tiles in the order of their list. Blocks that
    share a tile come in their order, or the last first; those past the end have first >= end.
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
def pointers(base, at, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers (ROWS, COLUMNS) to the rows from `at` of a matrix whose rows are `stride` apart."""
    corner = base + tl.cast(at, tl.int64) * stride
    return corner + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def within(at, end, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(ROWS, COLUMNS): which of the rows from `at` come before `end`, without padding columns."""
    inside = (at + tl.arange(0, ROWS) < end)[:, None]
    return inside & (tl.arange(0, COLUMNS) < HEAD_DIM)[None, :]


@triton.jit
def load_edge(
    base, at, end, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """The rows from `at`, zeros from `end` on and in padding columns."""
    inside = within(at, end, ROWS, COLUMNS, HEAD_DIM)
    return tl.load(pointers(base, at, stride, ROWS, COLUMNS), mask=inside, other=0.0)


@triton.jit
def store_edge(base, value, at, end, stride, HEAD_DIM: tl.constexpr):
    """Writes the rows from `at`, none from `end` on and no padding columns."""
    ROWS: tl.constexpr = value.shape[0]
    COLUMNS: tl.constexpr = value.shape[1]
    inside = within(at, end, ROWS, COLUMNS, HEAD_DIM)
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
    """The rows from `at` of a head, all of which exist: by the descriptor `rows` of all heads, or
    by pointers from `base`, the head's first row."""
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
    """Which query sees which key, of tokens of one document, broadcast: no later one, and none
    that is `window` or more before it. What holds anyway is left out by CAUSAL and WINDOWED."""
    if CAUSAL and WINDOWED:
        seen = (keys <= queries) & (queries - keys < window)
    elif CAUSAL:
        seen = keys <= queries
    else:
        seen = queries - keys < window
    return seen


def flat(x: Tensor) -> Tensor:
    """x (B, S, heads, D) as (T, heads, D) that descriptors can read: a view if it allows that.

    Descriptors need rows in one piece, and 16 bytes between and before any two of them.
    """
    tokens = x.flatten(0, 1)
    steps = [stride * x.element_size() for stride in tokens.stride()[:-1]]
    aligned = all(place % 16 == 0 for place in (*steps, tokens.data_ptr()))
    if aligned and tokens.stride(-1) == 1:
        return tokens
    return tokens.clone(memory_format=torch.contiguous_format)


def described(x: Tensor, rows: int, columns: int, descriptors: int) -> TensorDescriptor | Tensor:
    """A descriptor of blocks of `rows` tokens of one head of x (T, heads, D), padded to `columns`;
    x itself where kernels do without."""
    if not descriptors:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, columns])


def padded(head_dim: int) -> int:
    """The columns of a block: a power of two, and what matrix instructions take."""
    return max(16, triton.next_power_of_2(head_dim))


def side_by_side(stream: Tensor, groups: int, heads: int) -> int:
    """How many of `heads` heads to run at a time, in `groups` that share what they go through: two
    tensors like stream (T, its heads, D). As many whole groups as have these in the cache."""
    bytes_of_group = 2 * stream.numel() * stream.element_size() // groups
    return min(groups, max(1, CACHE_BYTES // bytes_of_group)) * (heads // groups)
