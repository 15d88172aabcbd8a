"""What computes a stage's fused operations: every key of `kernels`."""

from typing import Literal

from megagrow.config.sections import Section

RowBackend = Literal["auto", "triton", "torch"]


class KernelsConfig(Section):
    """A backend for each operation. `auto` is the fastest one that computes it correctly on the
    device at hand; one that is named and cannot run there ends the run before it starts.
    `megagrow doctor` tells what is possible here, and what `auto` takes."""

    attention: Literal["auto", "triton", "flash_attn", "sdpa", "reference"] = "auto"
    """`triton` and `flash_attn` pass over what a document does not see, `sdpa` (torch's own)
    computes it and throws it away; `reference` is the definition, for comparison."""
    norm: RowBackend = "auto"
    """RMSNorm, also together with the addition to the residual stream before it."""
    pointwise: RowBackend = "auto"
    """Rotary positions and SwiGLU."""
    loss: RowBackend = "auto"
    """Cross-entropy over a vocabulary that may be spread over ranks."""
    linear_cross_entropy: bool = False
    """Computes the head and the loss in chunks: the logits of all tokens are never in memory."""
