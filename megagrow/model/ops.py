"""Fused operations of the model, with the selected backend of each; the only importer of kernels.

Triton kernels and flash-attn are imported only when selected, so neither is required.

Shapes: B batch, S sequence, H query heads, G key/value heads, K head dimension, D hidden size,
F feed-forward width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagrow.errors import ResourceError
from megagrow.model.backends import Backends, KernelWorkload
from megagrow.model.machine import Machine
from megagrow.model.own_gradients import rms_norm, rope
from megagrow_kernels import reference
from megagrow_kernels.reference import attention_mask, rope_tables

__all__ = ["PLAIN", "TORCH_LOSS", "LossOps", "Ops", "attention_mask", "make_ops"]
__all__ += ["TRITON_CHUNKS", "rope_tables", "sdpa", "triton_loss"]

CUDNN_FIRST = 90
"""Minimum compute capability to prefer cuDNN's attention: it is 1.7 to 2.3 times as fast as the
default choice of torch."""

_SDPA_PRIORITY = [
    *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    *(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
]


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
    pack: Callable[[Tensor], Any]
    """(document_ids (B, S) on the CPU) -> input of `attention_mask`, on the CPU, with the methods
    `to` and `pin_memory` of a tensor."""
    attention_mask: Callable[[Any, Tensor, int | None], Any]
    """(result of `pack`, or None if attention crosses document boundaries; position_ids (B, S);
    window) -> mask argument of `attention`. With a window of w tokens, a token attends to itself
    and the w - 1 tokens before it. Called once per window and forward pass, with inputs on the
    device."""
    attention: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    """(q (B, S, H, K), k (B, S, G, K), v (B, S, G, K), attention_mask) -> (B, S, H, K), causal
    attention within documents and the window."""
    loss: LossOps
    """Operations of the cross-entropy."""


def make_ops(backends: Backends, machine: Machine, work: KernelWorkload) -> Ops:
    """Return the operations of a stage for backends returned by `backends.choose`.

    Raises ResourceError if flash-attn is installed but cannot be imported.
    """
    ops = PLAIN
    if backends.norm == "triton":
        ops = _with_triton_norm(ops)
    if backends.pointwise == "triton":
        ops = _with_triton_pointwise(ops)
    if backends.loss == "triton":
        ops = replace(ops, loss=triton_loss())
    return _ATTENTION[backends.attention](ops, machine, work)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return torch's attention: q (B, S, H, K), k and v (B, S, G, K), H a multiple of G.

    `mask` is None for causal attention, or the (B, 1, S, S) bool result of `attention_mask`.
    """
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _sdpa_cudnn_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    with sdpa_kernel(_SDPA_PRIORITY, set_priority=True):
        return sdpa(q, k, v, mask)


def _identity_pack(document_ids: Tensor) -> Tensor:
    return document_ids


def _dense_mask(
    document_ids: Tensor | None, position_ids: Tensor, window: int | None
) -> Tensor | None:
    if document_ids is None:
        if window is None or window >= position_ids.shape[1]:
            return None
        document_ids = torch.zeros_like(position_ids[:1])  # one mask for all rows
    return attention_mask(document_ids, window)


class MaskSpec(NamedTuple):
    """Mask of a backend that needs no matrix of it."""

    documents: Any
    """Result of `Ops.pack`, or None."""
    window: int | None


def _mask_spec(documents: Any, position_ids: Tensor, window: int | None) -> MaskSpec:
    return MaskSpec(documents, window)


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
    pack=_identity_pack,
    attention_mask=_dense_mask,
    attention=sdpa,
    loss=TORCH_LOSS,
)
"""torch implementation of all operations, for every device and precision."""


def _with_sdpa(ops: Ops, machine: Machine, work: KernelWorkload) -> Ops:
    # cuDNN's backward pass is not deterministic; the other backends follow torch's global setting.
    cudnn = machine.capability >= CUDNN_FIRST and not work.deterministic
    return replace(ops, attention=_sdpa_cudnn_first if cudnn else sdpa)


def _with_reference(ops: Ops, machine: Machine, work: KernelWorkload) -> Ops:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec) -> Tensor:
        return reference.attention(q, k, v, mask.documents, window=mask.window)

    return replace(ops, attention_mask=_mask_spec, attention=attend)


def _with_triton_norm(ops: Ops) -> Ops:
    from megagrow_kernels import rms_norm as kernels

    return replace(ops, rms_norm=kernels.rms_norm, add_rms_norm=kernels.add_rms_norm)


def _with_triton_pointwise(ops: Ops) -> Ops:
    from megagrow_kernels.rope import rope
    from megagrow_kernels.swiglu import swiglu

    return replace(ops, rope=rope, swiglu=swiglu)


TRITON_CHUNKS = 10
"""`LossOps.chunks` of the Triton kernels, which need no memory in addition to the logits."""


def triton_loss() -> LossOps:
    """Return the Triton loss: it reads the logits twice and overwrites them with their gradient."""
    from megagrow_kernels import cross_entropy as kernels

    def gradient(logits: Tensor, *rest: Any) -> Tensor:
        kernels.vocab_gradient_(logits, *rest)
        return logits

    return LossOps(kernels.vocab_statistics, kernels.combine_statistics, gradient, TRITON_CHUNKS)


def _with_triton_attention(ops: Ops, machine: Machine, work: KernelWorkload) -> Ops:
    from megagrow_kernels.attention import attention
    from megagrow_kernels.packing import pack

    @cache
    def one_document_per_row(batch: int, sequence: int, device: torch.device) -> Any:
        return pack(None, batch, sequence).to(device)

    def attention_mask(packing: Any, position_ids: Tensor, window: int | None) -> MaskSpec:
        if packing is None:
            packing = one_document_per_row(*position_ids.shape, position_ids.device)
        return MaskSpec(packing, window)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec) -> Tensor:
        return attention(q, k, v, mask.documents, window=mask.window)

    return _with_packed_attention(ops, attend, attention_mask, work)


def _with_flash_attn(ops: Ops, machine: Machine, work: KernelWorkload) -> Ops:
    try:
        import flash_attn
    except ImportError as error:
        raise ResourceError(f"flash-attn is installed but cannot be imported: {error}") from error

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec) -> Tensor:
        packing, window = mask
        options: dict[str, Any] = {"causal": True, "deterministic": work.deterministic}
        if window is not None:
            options["window_size"] = (window - 1, 0)  # tokens before and after the query
        if packing is None:
            return flash_attn.flash_attn_func(q, k, v, **options)
        ends, longest = packing.cu_seqlens, packing.longest
        tokens = (x.flatten(0, 1) for x in (q, k, v))
        out = flash_attn.flash_attn_varlen_func(*tokens, ends, ends, longest, longest, **options)
        return out.unflatten(0, q.shape[:2])

    return _with_packed_attention(ops, attend, _mask_spec, work)


def _with_packed_attention(
    ops: Ops,
    attend: Callable[..., Tensor],
    attention_mask: Callable[[Any, Tensor, int | None], MaskSpec],
    work: KernelWorkload,
) -> Ops:
    """Return ops with an attention that takes document boundaries as a `Packing`."""
    from megagrow_kernels.packing import pack

    return replace(
        ops,
        pack=lambda document_ids: pack(document_ids, *document_ids.shape),
        attention_mask=attention_mask,
        attention=partial(_attention_in_dtype, attend, work.dtype),
    )


def _attention_in_dtype(
    attend: Callable[..., Tensor],
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: MaskSpec,
) -> Tensor:
    """Return attention in the stage's dtype: under autocast, growth masks can widen its inputs."""
    return attend(q.to(dtype), k.to(dtype), v.to(dtype), attention_mask)


_ATTENTION = {
    "sdpa": _with_sdpa,
    "reference": _with_reference,
    "flash_attn": _with_flash_attn,
    "triton": _with_triton_attention,
}
