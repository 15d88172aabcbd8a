"""Selective scan and causal convolution of Mamba in torch, with written-out backward passes.

All S tokens need S x N x C decays and states per row. The scan therefore runs in blocks of tokens
whose decays and states fit in the cache of a CPU core, and the backward pass computes those of a
block again from the state before it. On a CPU, autograd of the reference takes 2.5 times as long.

Shapes: B batch, S sequence, C channels, N states of a channel, W taps of a convolution, R rows of
the batch that are scanned at once, T tokens of a block, P of a shorter last block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

STEP_ELEMENTS, BLOCK_ELEMENTS, MIN_TOKENS = 2**14, 2**17, 8
"""Largest R x N x C and T x R x N x C on a CPU, and smallest T. Measured: a block has three tensors
of BLOCK_ELEMENTS, which fit in an L2 cache of 2 MiB; smaller steps spend their time on calls."""
GPU_BLOCK_ELEMENTS = 2**24
"""Largest T x R x N x C on other devices; R is B there."""


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
    rows, tokens = _block_size(x, A)
    inputs = starts, *_discretized(x, dt, B, C, dt_bias)
    parts = zip(*(each.split(rows) for each in inputs), strict=True)
    y = torch.cat([_SelectiveScan.apply(_widened(A), tokens, *part) for part in parts])
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
    _, tokens = _block_size(x, A)
    scan = _BlockedScan(delta, drive, _widened(A), B, C, tokens)
    y, states = scan.outputs(state.transpose(1, 2))
    return _with_skip(y, x, D), states[-1].transpose(1, 2).to(state.dtype)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None) -> Tensor:
    """Return `reference.causal_conv`: silu(conv(x) + bias), (B, S, C) in the dtype of x.

    x is (B, S, C), weight is (C, W), whose last tap multiplies the current token, bias is (C,),
    starts is (B, S), True at the first token of a document. Differentiable once.
    """
    documents = None if starts is None else starts.cumsum(1)
    return F.silu(_CausalConv.apply(*map(_widened, (x, weight, bias)), documents)).to(x.dtype)


def _block_size(x: Tensor, A: Tensor) -> tuple[int, int]:
    """Return the numbers of rows and of tokens of a block."""
    on_cpu = x.device.type == "cpu"
    rows = min(len(x), max(1, STEP_ELEMENTS // A.numel())) if on_cpu else len(x)
    tokens = (BLOCK_ELEMENTS if on_cpu else GPU_BLOCK_ELEMENTS) // (rows * A.numel())
    return rows, min(x.shape[1], max(MIN_TOKENS, tokens))


def _discretized(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor
) -> tuple[Tensor, ...]:
    """Return delta, delta * x, B and C in the dtype of the computation."""
    # The default threshold of 20 has an error of 2e-9.
    delta = F.softplus(_widened(dt) + _widened(dt_bias), threshold=40)
    return delta, delta * x, _widened(B), _widened(C)


def _with_skip(y: Tensor, x: Tensor, D: Tensor) -> Tensor:
    return (y + _widened(D) * _widened(x)).to(x.dtype)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        scan = _BlockedScan(_restarted(delta, starts), drive, A, B, C, tokens)
        y, states = scan.outputs(A.new_zeros(1))
        ctx.save_for_backward(A, starts, delta, drive, B, C, states)
        ctx.tokens = tokens
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        A, starts, delta, drive, B, C, states = ctx.saved_tensors
        scan = _BlockedScan(_restarted(delta, starts), drive, A, B, C, ctx.tokens)
        of_A, *of_inputs = scan.gradients(grad, delta, states)
        return of_A, None, None, *of_inputs


def _restarted(delta: Tensor, starts: Tensor) -> Tensor:
    """Return step sizes whose decay is 0 where a document starts."""
    return delta.masked_fill(starts[..., None], torch.inf)


class _BlockedScan:
    """A scan that holds the decays and states of one block of tokens at a time.

    Tokens are first and channels last: the states of a token are contiguous, and broadcast
    operations are vectorized over channels. Products have an `out`, so that autocast skips them.
    """

    def __init__(
        self, delta: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor, tokens: int
    ) -> None:
        inputs = (delta, drive, B, C)
        self.delta_SRC, self.drive_SRC, self.B_SRN, self.C_SRN = map(_tokens_first, inputs)
        # A = 0 times an infinite delta is not a number.
        self.A_NC = A.clamp(max=-torch.finfo(A.dtype).tiny).T.contiguous()
        state = (len(delta), *self.A_NC.shape)
        self.decays_TRNC = A.new_empty(tokens, *state)
        self.states_TRNC = A.new_empty(tokens + 1, *state)  # from the one before the block
        self.decays, self.states = self.decays_TRNC.unbind(), self.states_TRNC.unbind()
        self.blocks = [slice(first, first + tokens) for first in range(0, delta.shape[1], tokens)]

    def outputs(self, state_RNC: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (R, S, C) and the states before each block and after the last."""
        y_SRC = torch.empty_like(self.drive_SRC)
        states = y_SRC.new_empty(len(self.blocks) + 1, *self.states[0].shape)
        states[0] = state_RNC
        for index, block in enumerate(self.blocks):
            _, states_PRNC = self._fill(block, states[index])
            _weighted_sum(self.C_SRN[block], states_PRNC[1:], out=y_SRC[block])
            states[index + 1] = states_PRNC[-1]
        return y_SRC.transpose(0, 1), states

    def gradients(self, grad: Tensor, delta: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of A, delta, drive, B and C.

        grad is that of y, delta is finite, states is the second result of `outputs`.
        """
        grad_SRC, delta_SRC = _tokens_first(grad), _tokens_first(delta)
        inputs = (delta_SRC, self.drive_SRC, self.B_SRN, self.C_SRN)
        of_delta, of_drive, of_B, of_C = map(torch.empty_like, inputs)
        of_A_NC = torch.zeros_like(self.A_NC)
        of_states_TRNC = torch.empty_like(self.decays_TRNC)
        entering_RNC = torch.zeros_like(self.states[0])  # gradient of the state before a block
        for index, block in reversed(list(enumerate(self.blocks))):
            decays, states_PRNC = self._fill(block, states[index])
            of_states = of_states_TRNC[: len(decays)]
            torch.mul(grad_SRC[block][:, :, None], self.C_SRN[block][..., None], out=of_states)
            self._propagate(of_states, entering_RNC)
            _weighted_sum(grad_SRC[block], states_PRNC[1:].mT, out=of_C[block])
            _weighted_sum(self.drive_SRC[block], of_states.mT, out=of_B[block])
            _weighted_sum(self.B_SRN[block], of_states, out=of_drive[block])
            entering_RNC.copy_(decays.mul_(of_states)[0])
            of_exponents = decays.mul_(states_PRNC[:-1])
            torch.sum(torch.mul(of_exponents, self.A_NC, out=of_states), 2, out=of_delta[block])
            of_A_NC += of_exponents.mul_(delta_SRC[block][:, :, None]).sum((0, 1))
        of_inputs = (each.transpose(0, 1) for each in (of_delta, of_drive, of_B, of_C))
        return of_A_NC.T, *of_inputs

    def _fill(self, block: slice, state_RNC: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decays of a block, and its states after the one before it."""
        delta, drive = self.delta_SRC[block][:, :, None], self.drive_SRC[block][:, :, None]
        decays, states = self.decays_TRNC[: len(delta)], self.states_TRNC[: len(delta) + 1]
        torch.exp(torch.mul(delta, self.A_NC, out=decays), out=decays)
        torch.mul(drive, self.B_SRN[block][..., None], out=states[1:])
        states[0] = state_RNC
        for token in range(len(delta)):
            self.states[token + 1].addcmul_(self.decays[token], self.states[token])
        return decays, states

    def _propagate(self, of_states_PRNC: Tensor, entering_RNC: Tensor) -> None:
        """Add to the gradient of each state that of the states after it."""
        of_states = of_states_PRNC.unbind()
        of_states[-1].add_(entering_RNC)
        for token in reversed(range(len(of_states) - 1)):
            of_states[token].addcmul_(self.decays[token + 1], of_states[token + 1])


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def _weighted_sum(weights: Tensor, rows: Tensor, out: Tensor) -> None:
    """Sum the rows of matrices (P, R, K, .) with weights (P, R, K) into out (P, R, .)."""
    weights, rows, out = (each.flatten(0, 1) for each in (weights, rows, out))
    torch.bmm(weights[:, None], rows, out=out[:, None])


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
