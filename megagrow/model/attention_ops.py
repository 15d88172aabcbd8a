"""Attention of each backend: its document format, its masks and the operation itself.

Triton kernels and flash-attn are imported only when selected, so neither is required.

Shapes: B batch, S sequence, H query heads, G key/value heads, K head dimension.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagrow.errors import ResourceError
from megagrow.model.backends import KernelWorkload
from megagrow.model.machine import Machine
from megagrow_kernels import reference
from megagrow_kernels.packing import document_starts
from megagrow_kernels.reference import attention_mask

CUDNN_FIRST = 90
"""Minimum compute capability to prefer cuDNN's attention: it is 1.7 to 2.3 times as fast as the
default choice of torch."""

_SDPA_PRIORITY = [
    *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION),
    *(SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
]


class AttentionOps(NamedTuple):
    """Operations of `model.ops.Ops` that depend on the attention backend."""

    pack: Callable[..., Any]
    attention_mask: Callable[..., Any]
    attention: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    document_starts: Callable[[Any, Tensor], Tensor | None]


def attention_ops(backend: str, machine: Machine, work: KernelWorkload) -> AttentionOps:
    """Return the operations of a backend.

    Raises ResourceError if flash-attn is installed but cannot be imported.
    """
    return _BACKENDS[backend](machine, work)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return torch's attention: q (B, Q, H, K), k and v (B, S, G, K), H a multiple of G.

    `mask` is None for causal attention with Q = S, else the result of `attention_mask`.
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


def _starts_of_ids(document_ids: Tensor | None, position_ids: Tensor) -> Tensor | None:
    return None if document_ids is None else document_starts(document_ids)


def _starts_of_packing(packing: Any, position_ids: Tensor) -> Tensor | None:
    if packing is None:
        return None
    starts = position_ids.new_zeros(position_ids.numel(), dtype=torch.bool)
    return starts.index_fill_(0, packing.cu_seqlens[:-1].long(), True).view(position_ids.shape)


def _identity_pack(document_ids: Tensor, queries: int | None = None) -> Tensor:
    return document_ids


def _dense_mask(
    document_ids: Tensor | None,
    position_ids: Tensor,
    window: int | None,
    queries: int | None = None,
) -> Tensor | None:
    keys = position_ids.shape[1]
    if document_ids is None:
        if window is None or window >= keys:
            if queries in (None, keys):
                return None
            # It imports torch's compiler, which takes 100 MB.
            from torch.nn.attention.bias import causal_lower_right

            return causal_lower_right(queries, keys)
        document_ids = torch.zeros_like(position_ids[:1])  # one mask for all rows
    return attention_mask(document_ids, window, queries)


class MaskSpec(NamedTuple):
    """Mask of a backend that needs no matrix of it."""

    documents: Any
    """Result of `Ops.pack`, or None."""
    window: int | None
    query_ends: Tensor | None = None
    """Number of queries before each document and in total, if some keys have none: (N + 1,) int32,
    for flash-attn."""


def _mask_spec(
    documents: Any, position_ids: Tensor, window: int | None, queries: int | None = None
) -> MaskSpec:
    return MaskSpec(documents, window)


SDPA = AttentionOps(_identity_pack, _dense_mask, sdpa, _starts_of_ids)
"""torch's attention, for every device and precision."""


def _sdpa(machine: Machine, work: KernelWorkload) -> AttentionOps:
    # cuDNN's backward pass is not deterministic; the other backends follow torch's global setting.
    cudnn = machine.capability >= CUDNN_FIRST and not work.deterministic
    return SDPA._replace(attention=_sdpa_cudnn_first if cudnn else sdpa)


def _reference(machine: Machine, work: KernelWorkload) -> AttentionOps:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec) -> Tensor:
        return reference.attention(q, k, v, mask.documents, window=mask.window)

    return SDPA._replace(attention_mask=_mask_spec, attention=attend)


def _triton(machine: Machine, work: KernelWorkload) -> AttentionOps:
    from megagrow_kernels.attention import attention
    from megagrow_kernels.packing import pack

    @cache
    def one_document_per_row(
        device: torch.device, batch: int, sequence: int, queries: int | None
    ) -> Any:
        return pack(None, batch, sequence, queries).to(device)

    def attention_mask(
        packing: Any, position_ids: Tensor, window: int | None, queries: int | None = None
    ) -> MaskSpec:
        if packing is None:
            packing = one_document_per_row(position_ids.device, *position_ids.shape, queries)
        return MaskSpec(packing, window)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec) -> Tensor:
        return attention(q, k, v, mask.documents, window=mask.window)

    return _packed(attend, attention_mask, work)


def _flash_attn(machine: Machine, work: KernelWorkload) -> AttentionOps:
    try:
        import flash_attn
    except ImportError as error:
        raise ResourceError(f"flash-attn is installed but cannot be imported: {error}") from error

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec) -> Tensor:
        packing, window, query_ends = mask
        options: dict[str, Any] = {"causal": True, "deterministic": work.deterministic}
        if window is not None:
            options["window_size"] = (window - 1, 0)  # tokens before and after the query
        if packing is None:
            return flash_attn.flash_attn_func(q, k, v, **options)
        ends, longest = packing.cu_seqlens, packing.longest
        starts = ends if query_ends is None else query_ends
        lengths = min(longest, q.shape[1]), longest
        tokens = (x.flatten(0, 1) for x in (q, k, v))
        # Both functions align the mask at the last query and key of a document.
        out = flash_attn.flash_attn_varlen_func(*tokens, starts, ends, *lengths, **options)
        return out.unflatten(0, q.shape[:2])

    return _packed(attend, _flash_attn_mask, work)


def _flash_attn_mask(
    packing: Any, position_ids: Tensor, window: int | None, queries: int | None = None
) -> MaskSpec:
    keys = position_ids.shape[1]
    if packing is None or queries in (None, keys):
        return MaskSpec(packing, window)
    row, column = packing.cu_seqlens // keys, packing.cu_seqlens % keys
    before = (column - (keys - queries)).clamp(min=0)
    return MaskSpec(packing, window, (row * queries + before).int())


def _packed(
    attend: Callable[..., Tensor],
    attention_mask: Callable[..., MaskSpec],
    work: KernelWorkload,
) -> AttentionOps:
    """Return the operations of an attention that takes document boundaries as a `Packing`."""
    from megagrow_kernels.packing import pack

    def pack_ids(document_ids: Tensor, queries: int | None = None) -> Any:
        batch, sequence = document_ids.shape
        return pack(document_ids, batch, sequence, queries)

    return AttentionOps(
        pack=pack_ids,
        attention_mask=attention_mask,
        attention=partial(_attention_in_dtype, attend, work.dtype),
        document_starts=_starts_of_packing,
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


_BACKENDS = {
    "sdpa": _sdpa,
    "reference": _reference,
    "flash_attn": _flash_attn,
    "triton": _triton,
}
