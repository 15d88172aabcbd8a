"""Eager references: each op in plain PyTorch, in the order of the published equations.

Shapes: B batch, S sequence, H query heads, G key/value heads, D head dimension, F feed-forward
width, C channels, N tokens (in a scan: state size), V vocabulary rows of this rank. Accumulation is
in fp32, or in fp64 for fp64 inputs.
"""

import torch
from torch import Tensor

CACHE_ELEMENTS = 2**18
"""Number of elements that one CPU core processes at a time."""


def widened(x: Tensor) -> Tensor:
    """Return x in the accumulation dtype: fp32, or fp64 if x is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019).

    x is (..., D) of any float dtype, weight is (D,). The result has the dtype of x.
    """
    x_fp32 = widened(x)
    inverse_rms = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return (widened(weight) * (x_fp32 * inverse_rms)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and that sum, which is rounded to its dtype before the norm.

    x and residual are (..., D), weight is (D,).
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope_tables(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotation angles, fp32, each (B, S, 1, D).

    position_ids is (B, S), frequencies is (D/2,). Angle i of position p is p * frequencies[i], with
    frequencies[i] = theta^(-2i/D) in a plain model. Both halves of D hold the same angles, as in
    Hugging Face's half-split order (Su et al. 2021).
    """
    angles = position_ids[:, :, None, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, S, heads, D) by the tables of `rope_tables`. Keeps the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, both (..., F) (Shazeer 2020)."""
    return torch.nn.functional.silu(gate) * up


def attention_mask(
    document_ids: Tensor, window: int | None = None, queries: int | None = None
) -> Tensor:
    """Return a boolean mask (B, 1, Q, S): True if a query may attend to a key.

    document_ids is (B, S). A token attends to itself and to earlier tokens of its document; with a
    window of w tokens, to itself and the w - 1 tokens before it. The queries are the last Q
    positions of each row; by default all of them.
    """
    keys = document_ids.shape[1]
    first = 0 if queries is None else keys - queries
    positions = torch.arange(keys, device=document_ids.device)
    distance = positions[first:, None] - positions
    in_window = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    same_document = document_ids[:, first:, None] == document_ids[:, None, :]
    return (same_document & in_window)[:, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Return causal attention softmax(scale q k^T) v with grouped key/value heads.

    q is (B, Q, H, D), k and v are (B, S, G, D) with H a multiple of G; the result is (B, Q, H, D).
    The queries are the last Q positions of each row of S keys. scale defaults to 1 / sqrt(D).
    """
    weights_BHSS = attention_weights(q, k, document_ids, scale, window)
    v_BSHD = widened(v.repeat_interleave(q.shape[2] // v.shape[2], dim=2))
    return (weights_BHSS @ v_BSHD.transpose(1, 2)).transpose(1, 2).to(q.dtype)


def attention_weights(
    q: Tensor,
    k: Tensor,
    document_ids: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Return the weights of `attention`, (B, H, Q, S) in the accumulation dtype."""
    if document_ids is None:
        document_ids = torch.zeros(k.shape[:2], dtype=torch.long, device=k.device)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    q_BHSD, k_BHSD = (widened(x).transpose(1, 2) for x in (q, k))
    scores = q_BHSD @ k_BHSD.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~attention_mask(document_ids, window, q.shape[1]), float("-inf"))
    return scores.softmax(-1)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None) -> Tensor:
    """Return silu(conv(x) + bias), a causal convolution of each channel (Gu and Dao 2023).

    x is (B, S, C), weight is (C, W), whose last tap multiplies the current token, and bias is (C,).
    starts (B, S) is True at the first token of a document: taps do not reach before it, nor before
    the first token of the row. The result has the dtype of x.
    """
    sequence, width = x.shape[1], weight.shape[1]
    x_BSC, weight, total = widened(x), widened(weight), widened(bias)
    documents_BS = None if starts is None else starts.cumsum(1)
    for distance in range(min(width, sequence)):
        tap = x_BSC[:, : sequence - distance]
        if documents_BS is not None:
            same = documents_BS[:, : sequence - distance] == documents_BS[:, distance:]
            tap = tap.masked_fill(~same[:, :, None], 0)
        tap = torch.nn.functional.pad(tap, (0, 0, distance, 0))
        total = total + weight[:, width - 1 - distance] * tap
    return torch.nn.functional.silu(total).to(x.dtype)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: Tensor | None = None,
) -> Tensor:
    """Return the selective state space model of Mamba (Gu and Dao 2023, equation 2, algorithm 2).

    With delta = softplus(dt + dt_bias), the state of each channel is h_t = exp(delta_t A) h_(t-1) +
    delta_t B_t x_t, and the output is y_t = <C_t, h_t> + D x_t. The state before the first token of
    a row is 0, and so is that before the first token of a document, where starts is True.

    x and dt are (B, S, C), A is (C, N) and negative, B and C are (B, S, N), D and dt_bias are (C,),
    starts is (B, S). The result is (B, S, C) in the dtype of x.
    """
    x_BSC, B_BSN, C_BSN = widened(x), widened(B), widened(C)
    delta = widened(dt) + widened(dt_bias)
    delta = torch.logaddexp(delta, torch.zeros_like(delta))  # unlike softplus, exact everywhere
    decay_BSCN = (delta[..., None] * widened(A)).exp()
    if starts is not None:
        decay_BSCN = decay_BSCN.masked_fill(starts[:, :, None, None], 0)
    entering_BSCN = (delta * x_BSC)[..., None] * B_BSN[:, :, None]
    state, outputs = torch.zeros_like(entering_BSCN[:, 0]), []
    steps = (decay_BSCN, entering_BSCN, C_BSN)
    for decay, entering, read in zip(*(step.unbind(1) for step in steps), strict=True):
        state = decay * state + entering
        outputs.append((state * read[:, None]).sum(-1))
    return (torch.stack(outputs, dim=1) + widened(D) * x_BSC).to(x.dtype)


def vocab_statistics(logits: Tensor, labels: Tensor, first: int, real: int) -> Tensor:
    """Return one rank's contribution to the cross-entropy, from its rows of the vocabulary.

    logits is (N, V) for the rows first..first+V, of which the first `real` are not padding; labels
    is (N,), indices into the full vocabulary. Returns (3, N) in fp32: the maximum, the sum of
    exp(logits - maximum), and the logit of the label (0 if another rank holds it). Ranks combine
    these three numbers without gathering the logits.
    """
    logits = _real(logits, real)
    maximum = logits.amax(-1)
    finite = maximum.masked_fill(maximum == -torch.inf, 0)  # padding only: the sum is 0
    parts = zip(*(x.split(_rows_at_once(logits)) for x in (logits, finite)), strict=True)
    total = torch.cat([(rows - most[:, None]).exp_().sum(-1) for rows, most in parts])
    index, mine = _within(labels, first, real)
    target = logits.gather(1, index[:, None])[:, 0]
    return torch.stack((maximum, total, target.masked_fill(~mine, 0)))


def combine_statistics(triples: Tensor) -> Tensor:
    """Combine the statistics (P, 3, N) of several ranks into those of all their rows, (3, N)."""
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
    """Return the gradient of sum(scale * ce + z_scale * lse^2) with respect to the logits.

    ce = lse - logit of the label is the cross-entropy of a token, and lse is its log-sum-exp
    (z-loss, Chowdhery et al. 2022, section 5). With p the softmax, the gradient is scale * (p - 1
    at the label) + 2 * z_scale * lse * p, and 0 in padding columns. maximum, total, scale and
    z_scale are (N,), the first two over the full vocabulary. The result is (N, V) in the dtype of
    the logits.
    """
    lse = maximum + total.log()
    columns = (x[:, None] for x in (maximum, total, scale + 2 * z_scale * lse))
    gradient = torch.empty_like(logits, dtype=widened(logits[:0]).dtype)
    for out, rows, most, sums, factor in zip(
        *(x.split(_rows_at_once(logits)) for x in (gradient, logits, *columns)), strict=True
    ):
        # Not exp(logits - lse): rounding lse loses its smaller term.
        torch.sub(_real(rows, real), most, out=out).exp_().div_(sums).mul_(factor)
    index, mine = _within(labels, first, real)
    gradient[torch.arange(len(labels), device=labels.device), index] -= scale * mine
    return gradient.to(logits.dtype)


def _real(logits: Tensor, real: int) -> Tensor:
    """Return logits in the accumulation dtype, with -inf in the padding columns from `real` on."""
    logits = widened(logits)
    if real == logits.shape[1]:
        return logits
    return logits.masked_fill(
        torch.arange(logits.shape[1], device=logits.device) >= real, -torch.inf
    )


def _rows_at_once(x: Tensor) -> int:
    """Return the number of rows to process together.

    On a CPU, the rows that fit in each core's cache: an intermediate tensor as large as x costs
    more there than the arithmetic.
    """
    if x.device.type != "cpu":
        return max(1, len(x))
    return max(1, CACHE_ELEMENTS * torch.get_num_threads() // x.shape[1])


def _within(labels: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """Return label indices clamped to this rank's rows, and a mask of the labels in these rows."""
    index = labels - first
    return index.clamp(0, max(real - 1, 0)), (index >= 0) & (index < real)
