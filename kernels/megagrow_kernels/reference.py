"""Eager references: what each op computes, in plain torch, in the order of the published equations.

Shapes: B batch, S sequence, H query heads, G key/value heads, D head dimension, F feed-forward
width, V rows of the vocabulary that this rank holds. Accumulation is in fp32, of fp64 in fp64.
"""

import torch
from torch import Tensor

CACHED = 2**18
"""Numbers that a core works on at once."""


def widened(x: Tensor) -> Tensor:
    """x in the type that sums are kept in: fp32, or fp64 if it is fp64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    x is (..., D) of any float type, weight is (D,); the result has the type of x.
    """
    x_fp32 = widened(x)
    inverse_rms = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return (widened(weight) * (x_fp32 * inverse_rms)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum, rounded to its type before it is normed."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope_tables(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, fp32, each (B, S, 1, D).

    Angle i of position p is p times frequency i, of D/2, which is theta^(-2i/D) in a plain model;
    the two halves of D hold the same angles, which is Hugging Face's order (Su et al. 2021, in the
    half-split form).
    """
    angles = position_ids[:, :, None, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x (B, S, heads, D) by the tables of `rope_tables`; keeps the type of x."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both (..., F) (Shazeer 2020)."""
    return torch.nn.functional.silu(gate) * up


def attention_mask(document_ids: Tensor, window: int | None = None) -> Tensor:
    """(B, 1, S, S) booleans: True where a query may see a key.

    document_ids is (B, S). A token sees itself and what comes before it within its own document,
    with a window of w tokens only itself and the w - 1 before.
    """
    positions = torch.arange(document_ids.shape[1], device=document_ids.device)
    behind = positions[:, None] - positions
    near = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    same_document = document_ids[:, :, None] == document_ids[:, None, :]
    return (same_document & near)[:, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention softmax(scale q k^T) v with grouped key/value heads; scale is 1 / sqrt(D).

    q is (B, S, H, D), k and v are (B, S, G, D) with H a multiple of G; the result is (B, S, H, D).
    """
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    if document_ids is None:
        document_ids = torch.zeros(q.shape[:2], dtype=torch.long, device=q.device)
    q_BHSD, k_BHSD, v_BHSD = (widened(x).transpose(1, 2) for x in (q, k, v))
    scores = q_BHSD @ k_BHSD.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~attention_mask(document_ids, window), float("-inf"))
    return (scores.softmax(-1) @ v_BHSD).transpose(1, 2).to(q.dtype)


def vocab_statistics(logits: Tensor, labels: Tensor, first: int, real: int) -> Tensor:
    """What one rank knows of the cross-entropy from its rows of the vocabulary.

    logits is (N, V) for the rows first..first+V, of which the first `real` are no padding; labels
    is (N,) in the whole vocabulary. Returns (3, N) in fp32: the maximum, the sum of
    exp(logits - maximum), and the logit of the label (0 where another rank holds it). Ranks combine
    the three without ever gathering the logits.
    """
    logits = _real(logits, real)
    maximum = logits.amax(-1)
    finite = maximum.masked_fill(maximum == -torch.inf, 0)  # a rank of padding only sums up to 0
    parts = zip(*(x.split(_rows_at_once(logits)) for x in (logits, finite)), strict=True)
    total = torch.cat([(rows - most[:, None]).exp_().sum(-1) for rows, most in parts])
    index, mine = _within(labels, first, real)
    target = logits.gather(1, index[:, None])[:, 0]
    return torch.stack((maximum, total, target.masked_fill(~mine, 0)))


def combine_statistics(triples: Tensor) -> Tensor:
    """The triples (P, 3, N) of several ranks as the triple of all their rows, (3, N)."""
    maxima, totals, targets = triples.unbind(1)
    maximum = maxima.amax(0)
    total = (totals * (maxima - maximum).exp()).sum(0)
    return torch.stack((maximum, total, targets.sum(0)))


def vocab_gradient(
    logits: Tensor,
    labels: Tensor,
    maximum: Tensor,
    total: Tensor,
    scale: Tensor,
    z_scale: Tensor,
    first: int,
    real: int,
) -> Tensor:
    """The gradient of sum(scale * ce + z_scale * lse^2) with respect to the logits, in their type.

    ce = lse - logit of the label is the cross-entropy of a token, lse the log of the sum of its
    exponentials (z-loss, Chowdhery et al. 2022, section 5): with p the softmax it is
    scale * (p - 1 at the label) + 2 * z_scale * lse * p, and 0 in padding. maximum, total, scale
    and z_scale are (N,), the first two over the whole vocabulary.
    """
    lse = maximum + total.log()
    # Not exp(logits - lse): that sum rounds the smaller part of lse away.
    gradient = (_real(logits, real) - maximum[:, None]).exp_().div_(total[:, None])
    gradient.mul_((scale + 2 * z_scale * lse)[:, None])
    index, mine = _within(labels, first, real)
    rows = torch.arange(len(labels), device=labels.device)
    gradient[rows, index] -= scale * mine
    return gradient.to(logits.dtype)


def _real(logits: Tensor, real: int) -> Tensor:
    """In the type of sums, with -inf in the columns from `real` on: padding takes no part."""
    logits = widened(logits)
    if real == logits.shape[1]:
        return logits
    return logits.masked_fill(
        torch.arange(logits.shape[1], device=logits.device) >= real, -torch.inf
    )


def _rows_at_once(x: Tensor) -> int:
    """On a CPU as many rows as stay in each core's cache: as large a tensor as x between two
    operations costs more there than they do."""
    if x.device.type != "cpu":
        return max(1, len(x))
    return max(1, CACHED * torch.get_num_threads() // x.shape[1])


def _within(labels: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """Where the labels stand in this rank's rows (somewhere, if not here), and which are here."""
    index = labels - first
    return index.clamp(0, max(real - 1, 0)), (index >= 0) & (index < real)
