"""What an op has to do at least: bytes to and from memory, and FLOPs. Pure arithmetic.

Bytes are those of a kernel that reads each input once and writes each output once; what is as small
as a row (gains, statistics) is left out. FLOPs are those of the matrix products alone. A packed
batch counts what its documents need, summed over them: tiles that a mask empties are no work.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What one call does at least; 0 where it is not the limit."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


NOTHING = Work()

TENSORS = {
    "rms_norm": (2, 3),  # x in, y out; x and dy in, dx out
    "add_rms_norm": (4, 4),  # x and residual in, total and y out; total, dy, dtotal in, dx out
    "swiglu": (3, 5),  # gate and up in, product out; both and its gradient in, two gradients out
    "rope": (2, 2),  # q and k in, and out again; their gradients likewise
    "cross_entropy": (1, 2),  # logits in; logits in, gradients out in their place
}
"""Tensors of the op's size that pass through memory, forward and backward."""


def row_work(op: str, elements: int, element_bytes: int) -> tuple[Work, Work]:
    """Forward and backward work of an op that passes over its rows; its largest tensor has so
    many elements (gate for swiglu, q and k together for rope)."""
    forward, backward = (count * elements * element_bytes for count in TENSORS[op])
    return Work(bytes=forward), Work(bytes=backward)


def seen_pairs(lengths: Sequence[int], window: int | None = None) -> int:
    """How many (query, key) pairs causal attention within documents of these lengths looks at.

    With a window w a query sees itself and the w - 1 tokens before it.
    """
    total = 0
    for length in lengths:
        reach = length if window is None else min(window, length)
        total += reach * (reach + 1) // 2 + (length - reach) * reach
    return total


def attention_work(
    lengths: Sequence[int], heads: int, head_dim: int, window: int | None = None
) -> tuple[Work, Work]:
    """Forward: q k^T and the sum over v, 2 head_dim FLOPs each per pair and head. Backward 2.5
    times that: the scores again, and the four products of their gradients."""
    forward = 4 * heads * head_dim * seen_pairs(lengths, window)
    return Work(flops=forward), Work(flops=forward * 5 // 2)


def linear_cross_entropy_work(tokens: int, hidden: int, vocabulary: int) -> Work:
    """Forward and backward: three matrix products, that of the logits and two of gradients."""
    return Work(flops=6 * tokens * hidden * vocabulary)
