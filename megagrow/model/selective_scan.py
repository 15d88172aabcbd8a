"""Selective scan and causal convolution of Mamba in torch, with written-out backward passes.

On a CPU, autograd of the references takes 2 to 3 times as long.

Shapes: B batch, S sequence, C channels, N states of a channel, W taps of a convolution, R rows of
the batch that are scanned at once, T tokens of a block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagrow.model.blocked_scan import BlockedScan
from megagrow.model.own_gradients import widened

STEP_ELEMENTS, BLOCK_ELEMENTS, MIN_TOKENS = 2**14, 2**17, 8
"""Largest R x N x C and T x R x N x C on a CPU, and smallest T. Measured: a block has three tensors
of BLOCK_ELEMENTS, which fit in an L2 cache of 2 MiB; smaller steps spend their time on calls."""
DEVICE_BLOCK_ELEMENTS = 2**25
"""Largest T x R x N x C on other devices, where R is B; a block has four tensors of it."""


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
    """Return `reference.selective_scan`, differentiable once.

    x and dt are (B, S, C), A is (C, N) and negative, B and C are (B, S, N), D and dt_bias are (C,),
    starts is (B, S), True at the first token of a document. The result is (B, S, C) in the dtype of
    x, computed in fp32, or in fp64 for fp64 inputs.
    """
    if starts is None:
        starts = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    rows, tokens = _block_size_of(x, A)
    inputs = starts, *_discretized(x, dt, B, C, dt_bias)
    parts = zip(*(each.split(rows) for each in inputs), strict=True)
    y = torch.cat([_SelectiveScan.apply(widened(A), tokens, *part) for part in parts])
    return _with_skip(y, x, D)


@torch.no_grad()
def selective_scan_from(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Continue a scan from state (B, C, N): return y (B, S, C) and the state after the last token.

    A token with dt = -inf leaves the state unchanged. Not differentiable.
    """
    delta, drive, B, C = _discretized(x, dt, B, C, dt_bias)
    _, tokens = _block_size_of(x, A)
    scan = BlockedScan(delta, drive, widened(A), B, C, tokens)
    y, states = scan.outputs(state.transpose(1, 2))
    return _with_skip(y, x, D), states[-1].transpose(1, 2).to(state.dtype)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None) -> Tensor:
    """Return `reference.causal_conv`: silu(conv(x) + bias), (B, S, C) in the dtype of x.

    x is (B, S, C), weight is (C, W), whose last tap multiplies the current token, bias is (C,),
    starts is (B, S), True at the first token of a document. Differentiable once.
    """
    documents = None if starts is None else starts.cumsum(1)
    return F.silu(_CausalConv.apply(*map(widened, (x, weight, bias)), documents)).to(x.dtype)


def _block_size_of(x: Tensor, A: Tensor) -> tuple[int, int]:
    batch, sequence, _ = x.shape
    return block_size(batch, sequence, A.numel(), x.device.type == "cpu")


def block_size(batch: int, sequence: int, states: int, on_cpu: bool) -> tuple[int, int]:
    """Return the numbers of rows and of tokens of a block; `states` is N x C."""
    rows = min(batch, max(1, STEP_ELEMENTS // states)) if on_cpu else batch
    tokens = (BLOCK_ELEMENTS if on_cpu else DEVICE_BLOCK_ELEMENTS) // (rows * states)
    # A power of 2 can be divided into chunks.
    return rows, min(sequence, max(MIN_TOKENS, 2 ** (tokens.bit_length() - 1)))


def _discretized(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor
) -> tuple[Tensor, ...]:
    """Return delta, delta * x, B and C in the dtype of the computation."""
    # The default threshold of 20 has an error of 2e-9.
    delta = F.softplus(widened(dt) + widened(dt_bias), threshold=40)
    return delta, delta * x, widened(B), widened(C)


def _with_skip(y: Tensor, x: Tensor, D: Tensor) -> Tensor:
    return (y + widened(D) * widened(x)).to(x.dtype)


class _SelectiveScan(torch.autograd.Function):
    """Outputs (R, S, C) of the recurrence h_t = exp(delta_t A) h_(t-1) + drive_t B_t."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        tokens: int,
        starts: Tensor,
        delta: Tensor,
        drive: Tensor,
        B: Tensor,
        C: Tensor,
    ) -> Tensor:
        scan = BlockedScan(_restarted(delta, starts), drive, A, B, C, tokens)
        y, states = scan.outputs(A.new_zeros(1))
        ctx.save_for_backward(A, starts, delta, drive, B, C, states)
        ctx.tokens = tokens
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        A, starts, delta, drive, B, C, states = ctx.saved_tensors
        scan = BlockedScan(_restarted(delta, starts), drive, A, B, C, ctx.tokens)
        of_A, *of_inputs = scan.gradients(grad, delta, states)
        return of_A, None, None, *of_inputs


def _restarted(delta: Tensor, starts: Tensor) -> Tensor:
    """Return step sizes whose decay is 0 where a document starts."""
    return delta.masked_fill(starts[..., None], torch.inf)


class _CausalConv(torch.autograd.Function):
    """Convolution of each channel of x (B, S, C) with the taps (C, W), plus a bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, documents: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, documents)
        taps = weight.T.flip(0)  # (W, C), by distance to the current token
        out = torch.addcmul(bias, x, taps[0])
        for distance in range(1, min(len(taps), x.shape[1])):
            reached = _within_documents(x[:, :-distance], documents)
            out[:, distance:].addcmul_(reached, taps[distance])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, documents = ctx.saved_tensors
        taps = weight.T.flip(0)
        of_x, of_taps = grad * taps[0], torch.zeros_like(taps)
        of_taps[0] = (grad * x).sum((0, 1))
        for distance in range(1, min(len(taps), x.shape[1])):
            reached = _within_documents(grad[:, distance:], documents)
            of_x[:, :-distance].addcmul_(reached, taps[distance])
            of_taps[distance] = (reached * x[:, :-distance]).sum((0, 1))
        return of_x, of_taps.flip(0).T, grad.sum((0, 1)), None


def _within_documents(x: Tensor, documents: Tensor | None) -> Tensor:
    """Return x (B, S - distance, C), 0 for pairs of tokens of two documents (B, S)."""
    if documents is None:
        return x
    distance = documents.shape[1] - x.shape[1]
    same = documents[:, distance:] == documents[:, :-distance]
    return x * same[..., None]
