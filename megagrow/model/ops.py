"""Fused operations of the model, with the selected backend of each; the only importer of kernels.

Triton kernels, flash-attn and mamba-ssm are imported only when selected, so none is required.

Shapes: B batch, S sequence, H query heads, G key/value heads, K head dimension, D hidden size,
F feed-forward width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from torch import Tensor

from megagrow.errors import ResourceError
from megagrow.model.attention_ops import SDPA, attention_ops
from megagrow.model.backends import Backends, KernelWorkload
from megagrow.model.machine import Machine
from megagrow.model.own_gradients import rms_norm, rope
from megagrow.model.selective_scan import causal_conv, selective_scan
from megagrow_kernels import reference
from megagrow_kernels.packing import document_starts
from megagrow_kernels.reference import rope_tables

__all__ = ["PLAIN", "TORCH_LOSS", "TRITON_CHUNKS", "LossOps", "Ops", "make_ops"]
__all__ += ["document_starts", "rope_tables", "triton_loss"]


@dataclass(frozen=True)
class LossOps:
    """Operations of a vocabulary-parallel cross-entropy: N tokens, V vocabulary rows of this rank.

    kernels/megagrow_kernels/reference.py defines them.
    """

    statistics: Callable[[Tensor, Tensor, int, int], Tensor]
    """(logits (N, V), labels (N,), first, real) -> (3, N), statistics of this rank's rows."""
    combine: Callable[[Tensor], Tensor]
    """(statistics (P, 3, N) of P ranks) -> (3, N), statistics of all rows."""
    gradient: Callable[..., Tensor]
    """(logits, labels, maximum, total, scale, z_scale, first, real) -> (N, V), gradient of the
    logits; may overwrite the logits."""
    chunks: int
    """Number of token chunks of a fused head and loss. A chunk then needs less than an eighth of
    the memory of all logits."""


@dataclass(frozen=True)
class Ops:
    """Operations of a model, each implemented by its selected backend."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x (..., D), weight (D,), eps) -> (..., D), RMSNorm over the last dimension."""
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None
    """(x, residual, weight, eps) -> (norm of x + residual, x + residual); None if the backend does
    not fuse them."""
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(q (B, S, H, K), k (B, S, G, K), cos (B, S, 1, K), sin) -> (q, k), rotated."""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """(gate (..., F), up (..., F)) -> silu(gate) * up."""
    pack: Callable[..., Any]
    """(document_ids (B, S) on the CPU, queries = None) -> input of `attention_mask`, on the CPU,
    with the methods `to` and `pin_memory` of a tensor. With `queries`, only that number of
    positions at the end of each row attend."""
    attention_mask: Callable[..., Any]
    """(result of `pack`, or None if attention crosses document boundaries; position_ids (B, S);
    window; queries = None) -> mask argument of `attention`. With a window of w tokens, a token
    attends to itself and the w - 1 tokens before it. Called once per window and forward pass, with
    inputs on the device."""
    attention: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    """(q (B, Q, H, K), k (B, S, G, K), v (B, S, G, K), attention_mask) -> (B, Q, H, K), causal
    attention within documents and the window. Q is S, or the `queries` of the mask."""
    document_starts: Callable[[Any, Tensor], Tensor | None]
    """(result of `pack` or None, position_ids (B, S)) -> (B, S) bool, True at the first token of
    each document; None for None."""
    causal_conv: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """(x (B, S, C), weight (C, W), bias (C,), starts (B, S) or None) -> (B, S, C), silu of a causal
    depthwise convolution within documents."""
    selective_scan: Callable[..., Tensor]
    """(x (B, S, C), dt (B, S, C), A (C, N), B (B, S, N), C (B, S, N), D (C,), dt_bias (C,), starts
    or None) -> (B, S, C), the recurrence of `reference.selective_scan` within documents."""
    loss: LossOps
    """Operations of the cross-entropy."""


def make_ops(backends: Backends, machine: Machine, work: KernelWorkload) -> Ops:
    """Return the operations of a stage for backends returned by `backends.choose`.

    Raises ResourceError if flash-attn or mamba-ssm is installed but cannot be imported.
    """
    ops = PLAIN
    if backends.norm == "triton":
        ops = _with_triton_norm(ops)
    if backends.pointwise == "triton":
        ops = _with_triton_pointwise(ops)
    if backends.scan == "triton":
        ops = _with_triton_scan(ops)
    if backends.scan == "mamba_ssm":
        ops = _with_mamba_ssm(ops)
    if backends.loss == "triton":
        ops = replace(ops, loss=triton_loss())
    return replace(ops, **attention_ops(backends.attention, machine, work)._asdict())


TORCH_LOSS = LossOps(
    reference.vocab_statistics,
    reference.combine_statistics,
    reference.vocab_gradient,
    chunks=64,  # fp32 copies take up to 7 times the bytes of a bf16 chunk
)
"""torch implementation for every precision; does not overwrite the logits."""


PLAIN = Ops(
    rms_norm=rms_norm,
    add_rms_norm=None,
    rope=rope,
    swiglu=reference.swiglu,
    **SDPA._asdict(),
    causal_conv=causal_conv,
    selective_scan=selective_scan,
    loss=TORCH_LOSS,
)
"""torch implementation of all operations, for every device and precision."""


def _with_triton_norm(ops: Ops) -> Ops:
    from megagrow_kernels import rms_norm as kernels

    return replace(ops, rms_norm=kernels.rms_norm, add_rms_norm=kernels.add_rms_norm)


def _with_triton_pointwise(ops: Ops) -> Ops:
    from megagrow_kernels.rope import rope
    from megagrow_kernels.swiglu import swiglu

    return replace(ops, rope=rope, swiglu=swiglu)


def _with_triton_scan(ops: Ops) -> Ops:
    from megagrow_kernels.causal_conv import causal_conv
    from megagrow_kernels.selective_scan import selective_scan

    return replace(ops, causal_conv=causal_conv, selective_scan=selective_scan)


def _with_mamba_ssm(ops: Ops) -> Ops:
    from megagrow_kernels import mamba_ssm_backend as kernels

    try:
        import_module("mamba_ssm.ops.selective_scan_interface")
        import_module("causal_conv1d")
    except ImportError as error:
        raise ResourceError(f"mamba-ssm is installed but cannot be imported: {error}") from error
    return replace(ops, causal_conv=kernels.causal_conv, selective_scan=kernels.selective_scan)


TRITON_CHUNKS = 10
"""`LossOps.chunks` of the Triton kernels, which need no memory in addition to the logits."""


def triton_loss() -> LossOps:
    """Return the Triton loss: it reads the logits twice and overwrites them with their gradient."""
    from megagrow_kernels import cross_entropy as kernels

    def gradient(logits: Tensor, *rest: Any) -> Tensor:
        kernels.vocab_gradient_(logits, *rest)
        return logits

    return LossOps(kernels.vocab_statistics, kernels.combine_statistics, gradient, TRITON_CHUNKS)
