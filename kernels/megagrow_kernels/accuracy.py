"""Accuracy criterion of all kernel checks: the tests, the self-check at the start and the tuner.

A result is compared with the exact one, computed in fp64, in segments of consecutive elements of
the last dimension. The error of each segment is relative to the size of that segment: an error in a
few rows, heads or columns is not hidden by larger ones elsewhere. Where terms cancel, rounding is
relative to the terms, so a check passes their size in addition.

Shapes: B batch, S sequence, H query heads, G key/value heads, D head dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megagrow_kernels import reference

SEGMENT = 16
"""Elements per segment."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}
"""Largest relative error of a segment, by dtype of the result. 16-bit: 4 units in the last place;
kernels that round only probabilities and results need 1. fp32: the hardware's exponential and
division are approximate, and sums have thousands of terms."""

RELATIVE_RMSE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Largest root mean square error of a tensor relative to that of the exact result, by dtype."""


def segment_error(
    actual: Tensor, exact: Tensor, terms: Tensor | None = None, twin: Tensor | None = None
) -> float:
    """Return the largest relative error of a segment; NaN if any element is NaN.

    Args:
        actual: result of a kernel, of any shape.
        exact: exact result, fp64.
        terms: size of the terms that are summed to each element, where they cancel; broadcast to
            the shape of `exact`. The error is relative to the larger of both sizes, and at least to
            the smallest normal number of the dtype of `actual`.
        twin: result of the same equations in plain PyTorch, in the dtype of `actual`. Twice its
            error is subtracted: it is due to the equations and the dtype.
    """
    error, size = _segment_rms(actual.double() - exact), _segment_rms(exact)
    if twin is not None:
        error = error - 2 * _segment_rms(twin.double() - exact)
    if terms is not None:
        size = torch.maximum(size, _segment_rms(terms.expand_as(exact)))
    return float((error / size.clamp(min=torch.finfo(actual.dtype).tiny)).max())


def relative_rmse(actual: Tensor, exact: Tensor, terms: Tensor | None = None) -> float:
    """Return the root mean square error relative to that of the exact result, or of `terms`."""
    size = exact.square().mean()
    if terms is not None:
        size = torch.maximum(size, terms.expand_as(exact).square().mean())
    tiny = torch.finfo(actual.dtype).tiny
    return float(((actual.double() - exact).square().mean() / size.clamp(min=tiny**2)).sqrt())


def attention_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    document_ids: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `terms` of the gradients of q (B, S, H, 1), k and v (B, S, G, 1), zero for v.

    With P the weights and dP = dO V^T, the gradient of the scores is P (dP - delta), where
    delta = rowsum(dO O). Both are equal if a query sees one key, or puts all weight on one. The
    rounding of O then remains: an error of delta relative to the norm of dO O, which reaches the
    gradients by P K and P^T Q.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups, repeats = k.shape[2], q.shape[2] // k.shape[2]
    weights_BHSS = reference.attention_weights(q, k, document_ids, scale, window)
    k_BHSD, v_BHSD = (x.repeat_interleave(repeats, dim=2).transpose(1, 2) for x in (k, v))
    rounding_BHS1 = (weights_BHSS @ v_BHSD * grad.transpose(1, 2)).norm(dim=-1, keepdim=True)
    of_q = rounding_BHS1 * _rms(weights_BHSS @ k_BHSD)
    terms_BHSS = weights_BHSS * rounding_BHS1 * _rms(q.transpose(1, 2))
    of_k = terms_BHSS.unflatten(1, (groups, repeats)).square().sum((2, 3)).sqrt()
    of_q, of_k = scale * of_q.transpose(1, 2), scale * of_k.transpose(1, 2)[..., None]
    return of_q, of_k, torch.zeros_like(of_k)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill the results of torch.empty with NaN (or the largest integer) within the context.

    Elements that a kernel does not write, or reads before they are written, become visible.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


def _segment_rms(x: Tensor) -> Tensor:
    """Return the root mean square of each segment; the last one overlaps if x has a remainder."""
    size = min(SEGMENT, x.shape[-1])
    return torch.cat((_rms(x.unfold(-1, size, size)).squeeze(-1), _rms(x[..., -size:])), -1)
