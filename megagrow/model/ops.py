"""The only door to the kernels: the model's fused operations as one value, chosen for a stage.

Kernels in Triton, and flash-attn, are imported where they are chosen and nowhere else: a machine
that has neither can do all that torch does.

Shapes: B batch, S sequence, H query heads, G key/value heads, K head dimension, D hidden size,
F feed-forward width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagrow.errors import ResourceError
from megagrow.model.backends import Backends, KernelWorkload
from megagrow.model.machine import Machine
from megagrow_kernels import reference
from megagrow_kernels.reference import attention_mask, rope_tables

__all__ = ["PLAIN", "TORCH_LOSS", "LossOps", "Ops", "attention_mask", "make_ops", "rms_norm"]
__all__ += ["TRITON_CHUNKS", "rope_tables", "sdpa", "triton_loss"]

CUDNN_FIRST = 90
"""From this compute capability on, cuDNN's attention is 1.7 to 2.3 times as fast as the one that
torch would take."""

_BY_SPEED = [
    *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    *(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
]


@dataclass(frozen=True)
class LossOps:
    """Partial operations of a cross-entropy, computed by each rank from its rows of the
    vocabulary: N tokens, V rows (defined in kernels/megagrow_kernels/reference.py)."""

    statistics: Callable[[Tensor, Tensor, int, int], Tensor]
    """(logits (N, V), labels (N,), first, real) -> (3, N), partial statistics of this rank's
    rows."""
    combine: Callable[[Tensor], Tensor]
    """((P, 3, N) of P ranks) -> (3, N), statistics of all rows."""
    gradient: Callable[..., Tensor]
    """(logits, labels, maximum, total, scale, z_scale, first, real): that of the logits, maybe in
    their own memory."""
    chunks: int
    """Into so many the tokens are cut where head and loss are one: then all that a chunk needs is
    less than an eighth of the logits."""


@dataclass(frozen=True)
class Ops:
    """Operations of a model, each by its selected backend."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x (..., D), weight (D,), eps): the norm over the last dimension."""
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] | None
    """(x, residual, weight, eps): the norm of x + residual, and that sum; None where there is no
    backend that does both at once."""
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(q (B, S, H, K), k (B, S, G, K), cos (B, S, 1, K), sin): both turned."""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """(gate (..., F), up): silu(gate) * up."""
    pack: Callable[[Tensor], Any]
    """(document_ids (B, S), on the CPU): what `attention_mask` takes of them, still on the CPU; it
    has a
    method `to`, as a tensor has."""
    attention_mask: Callable[[Any, Tensor], Any]
    """(what `pack` gave, or None where attention does not stop at documents; position_ids (B, S)),
    on the device, once in a forward pass: what each query may see, for `attention`."""
    attention: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    """(q (B, S, H, K), k (B, S, G, K), v, sight): causal attention within documents."""
    loss: LossOps
    """Operations of the cross-entropy."""


def make_ops(backends: Backends, machine: Machine, work: KernelWorkload) -> Ops:
    """The operations of a stage, by backends that `backends.choose` finds possible.

    Raises InputError where flash-attn is installed but cannot be imported.
    """
    ops = PLAIN
    if backends.norm == "triton":
        ops = _with_triton_norm(ops)
    if backends.pointwise == "triton":
        ops = _with_triton_pointwise(ops)
    if backends.loss == "triton":
        ops = replace(ops, loss=triton_loss())
    return _ATTENTION[backends.attention](ops, machine, work)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, by torch: x (..., D), weight (D,)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention, by torch: q (B, S, H, K), k and v (B, S, G, K), H a multiple of G.

    `mask` is None for plain causal order, or the (B, 1, S, S) booleans of `attention_mask`.
    """
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _sdpa_cudnn_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    with sdpa_kernel(_BY_SPEED, set_priority=True):
        return sdpa(q, k, v, mask)


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference.apply_rope(q, cos, sin), reference.apply_rope(k, cos, sin)


def _as_it_is(document_ids: Tensor) -> Tensor:
    return document_ids


def _dense_mask(document_ids: Tensor | None, position_ids: Tensor) -> Tensor | None:
    return None if document_ids is None else attention_mask(document_ids)


def _unchanged(documents: Any, position_ids: Tensor) -> Any:
    return documents


TORCH_LOSS = LossOps(
    reference.vocab_statistics,
    reference.combine_statistics,
    reference.vocab_gradient,
    chunks=64,  # copies in fp32: up to seven times a chunk of bf16
)
"""torch implementation for every precision; keeps the logits."""


PLAIN = Ops(
    rms_norm=rms_norm,
    add_rms_norm=None,
    rope=_rope,
    swiglu=reference.swiglu,
    pack=_as_it_is,
    attention_mask=_dense_mask,
    attention=sdpa,
    loss=TORCH_LOSS,
)
"""torch implementation of all operations, available on every machine in every precision."""


def _with_sdpa(ops: Ops, machine: Machine, work: KernelWorkload) -> Ops:
    cudnn = machine.capability >= CUDNN_FIRST
    return replace(ops, attention=_sdpa_cudnn_first if cudnn else sdpa)


def _with_reference(ops: Ops, machine: Machine, work: KernelWorkload) -> Ops:
    return replace(ops, attention_mask=_unchanged, attention=reference.attention)


def _with_triton_norm(ops: Ops) -> Ops:
    from megagrow_kernels import rms_norm as kernels

    return replace(ops, rms_norm=kernels.rms_norm, add_rms_norm=kernels.add_rms_norm)


def _with_triton_pointwise(ops: Ops) -> Ops:
    from megagrow_kernels.rope import rope
    from megagrow_kernels.swiglu import swiglu

    return replace(ops, rope=rope, swiglu=swiglu)


TRITON_CHUNKS = 10
"""`LossOps.chunks` by Triton, whose kernels take no memory besides the logits."""


def triton_loss() -> LossOps:
    """Triton implementation: logits are read twice, then overwritten with their gradient."""
    from megagrow_kernels import cross_entropy as kernels

    def gradient(logits: Tensor, *rest: Any) -> Tensor:
        kernels.vocab_gradient_(logits, *rest)
        return logits

    return LossOps(kernels.vocab_statistics, kernels.combine_statistics, gradient, TRITON_CHUNKS)


def _with_triton_attention(ops: Ops, machine: Machine, work: KernelWorkload) -> Ops:
    from megagrow_kernels.attention import attention
    from megagrow_kernels.packing import pack

    @cache
    def whole_rows(batch: int, sequence: int, device: torch.device) -> Any:
        return pack(None, batch, sequence).to(device)

    def attention_mask(packing: Any, position_ids: Tensor) -> Any:
        return whole_rows(*position_ids.shape, position_ids.device) if packing is None else packing

    return _with_packed(ops, attention, attention_mask, work)


def _with_flash_attn(ops: Ops, machine: Machine, work: KernelWorkload) -> Ops:
    try:
        import flash_attn
    except ImportError as error:
        raise ResourceError(f"flash-attn is installed but cannot be imported: {error}") from error

    def attend(q: Tensor, k: Tensor, v: Tensor, packing: Any) -> Tensor:
        options = {"causal": True, "deterministic": True}
        if packing is None:
            return flash_attn.flash_attn_func(q, k, v, **options)
        ends, longest = packing.cu_seqlens, packing.longest
        tokens = (x.flatten(0, 1) for x in (q, k, v))
        out = flash_attn.flash_attn_varlen_func(*tokens, ends, ends, longest, longest, **options)
        return out.unflatten(0, q.shape[:2])

    return _with_packed(ops, attend, _unchanged, work)


def _with_packed(
    ops: Ops,
    attend: Callable[..., Tensor],
    attention_mask: Callable[[Any, Tensor], Any],
    work: KernelWorkload,
) -> Ops:
    """With an attention that takes documents as a `Packing`."""
    from megagrow_kernels.packing import pack

    return replace(
        ops,
        pack=lambda document_ids: pack(document_ids, *document_ids.shape),
        attention_mask=attention_mask,
        attention=partial(_in_type, attend, work.dtype),
    )


def _in_type(
    attend: Callable[..., Tensor],
    dtype: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Any,
) -> Tensor:
    """Attention in the type of the stage: under autocast, masks may have made it a wider one."""
    return attend(q.to(dtype), k.to(dtype), v.to(dtype), attention_mask)


_ATTENTION = {
    "sdpa": _with_sdpa,
    "reference": _with_reference,
    "flash_attn": _with_flash_attn,
    "triton": _with_triton_attention,
}
