"""Minimum work of an op: memory traffic in bytes, and FLOPs. Pure arithmetic.

Bytes assume that each input is read once and each output written once; row-sized tensors (gains,
statistics) are ignored. FLOPs count only matrix products. A packed batch counts the sum over its
documents: tiles that are fully masked count as no work.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KernelWork:
    """Minimum work of one call; 0 for a resource that is not the limit."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: "KernelWork") -> "KernelWork":
        return KernelWork(self.bytes + other.bytes, self.flops + other.flops)


NOTHING = KernelWork()

TENSORS = {
    "rms_norm": (2, 3),  # x in, y out; x and dy in, dx out
    "add_rms_norm": (4, 4),  # x and residual in, total and y out; total, dy, dtotal in, dx out
    "swiglu": (3, 5),  # gate and up in, product out; both and its gradient in, two gradients out
    "rope": (2, 2),  # q and k in and out; their gradients likewise
    "causal_conv": (2, 3),  # x in, y out; x and dy in, dx out
    "selective_scan": (3, 5),  # x and dt in, y out; both and dy in, two gradients out
    "cross_entropy": (1, 2),  # logits in; logits in, gradients out in place
}
"""Tensors of the op's size that pass through memory, forward and backward."""


def row_work(op: str, elements: int, element_bytes: int) -> tuple[KernelWork, KernelWork]:
    """Return the forward and backward work of a row-wise op.

    `elements` is the size of its largest tensor (gate for swiglu, q and k together for rope).
    """
    forward, backward = (count * elements * element_bytes for count in TENSORS[op])
    return KernelWork(bytes=forward), KernelWork(bytes=backward)


def seen_pairs(lengths: Sequence[int], window: int | None = None) -> int:
    """Return the number of (query, key) pairs of causal attention within documents.

    With a window w a query sees itself and the w - 1 tokens before it.
    """
    total = 0
    for length in lengths:
        span = length if window is None else min(window, length)
        total += span * (span + 1) // 2 + (length - span) * span
    return total


def attention_work(
    lengths: Sequence[int], heads: int, head_dim: int, window: int | None = None
) -> tuple[KernelWork, KernelWork]:
    """Return the forward and backward work of attention.

    Forward: q k^T and the sum over v, 2 head_dim FLOPs each per pair and head. Backward: 2.5 times
    that, for the scores again and the four products of their gradients.
    """
    forward = 4 * heads * head_dim * seen_pairs(lengths, window)
    return KernelWork(flops=forward), KernelWork(flops=forward * 5 // 2)


def linear_cross_entropy_work(tokens: int, hidden: int, vocabulary: int) -> KernelWork:
    """Return the forward and backward work: the matrix products of logits and two gradients."""
    return KernelWork(flops=6 * tokens * hidden * vocabulary)
