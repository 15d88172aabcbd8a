"""Scan of a selective state space model in blocks of tokens, and its gradients.

All S tokens need S x N x C decays and states per row. A block of tokens is short enough that its
decays and states fit in the cache of a CPU core, and the gradients compute those of a block again
from the state before it.

Shapes: S sequence, R rows of a batch, C channels, N states of a channel, T tokens of a block, P of
a block that may be the shorter last one.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


class BlockedScan:
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
        self.decays = _Tokens.of(A.new_empty(tokens + 1, *state))
        self.states = _Tokens.of(A.new_empty(tokens + 1, *state))  # from the one before the block
        self.blocks = [slice(first, first + tokens) for first in range(0, delta.shape[1], tokens)]

    def outputs(self, state_RNC: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (R, S, C) and the states before each block and after the last."""
        y_SRC = torch.empty_like(self.drive_SRC)
        states = y_SRC.new_empty(len(self.blocks) + 1, *self.states.each[0].shape)
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
        of_all_states = _Tokens.of(torch.empty_like(self.decays.all))
        entering_RNC = torch.zeros_like(states[0])  # gradient of the state before a block
        for index, block in reversed(list(enumerate(self.blocks))):
            decays, states_PRNC = self._fill(block, states[index])
            tokens = len(decays)
            of_states = of_all_states.all[:tokens]
            torch.mul(grad_SRC[block][:, :, None], self.C_SRN[block][..., None], out=of_states)
            self.decays.each[tokens].fill_(1)  # the gradient that enters has no decay
            following = self.decays.part(1, tokens + 1)
            _accumulate(following, of_all_states.part(0, tokens), entering_RNC, backward=True)
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
        tokens = len(delta)
        decays, states = self.decays.part(0, tokens), self.states.part(1, tokens + 1)
        torch.exp(torch.mul(delta, self.A_NC, out=decays.all), out=decays.all)
        torch.mul(drive, self.B_SRN[block][..., None], out=states.all)
        _accumulate(decays, states, self.states.each[0].copy_(state_RNC))
        return decays.all, self.states.all[: tokens + 1]


@dataclass(frozen=True)
class _Tokens:
    """A tensor (T, R, N, C) and views of its tokens, which take as long to create as a step."""

    all: Tensor
    each: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "_Tokens":
        return cls(tensor, tensor.unbind())

    def part(self, first: int, last: int) -> "_Tokens":
        return _Tokens(self.all[first:last], self.each[first:last])


def _accumulate(decays: _Tokens, values: _Tokens, before: Tensor, backward: bool = False) -> None:
    """Add to each of P values its decay times the value before it, in place and one by one.

    `before` is the value before the first, or with `backward` the value after the last.
    """
    chunk = _chunk_length(values.all)
    steps: list[tuple[Tensor, ...]] = list(zip(decays.each, values.each, values.each, strict=True))
    if chunk > 1:
        steps = _accumulate_chunks(decays.all, values.all, chunk, backward)
    for decay, value, end in reversed(steps) if backward else steps:
        value.addcmul_(decay, before)
        before = end


def _accumulate_chunks(
    decays: Tensor, values: Tensor, chunk: int, backward: bool
) -> list[tuple[Tensor, ...]]:
    """Accumulate within chunks: return the products of decays, the values and the last of each."""
    decays, values = (each.unflatten(0, (-1, chunk)) for each in (decays, values))
    products, order = decays.clone(), range(chunk)[:: -1 if backward else 1]
    for last, token in pairwise(order):
        values[:, token].addcmul_(decays[:, token], values[:, last])
        products[:, token].mul_(products[:, last])
    ends = values[:, order[-1]]
    return list(zip(*(each.unbind() for each in (products, values, ends)), strict=True))


def _chunk_length(values: Tensor) -> int:
    """Return the number of tokens of a chunk: a step over all chunks is one call.

    It divides the number of values. On a CPU, single tokens need fewer passes over memory.
    """
    if values.device.type == "cpu":
        return 1
    count = len(values)
    return next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def _weighted_sum(weights: Tensor, rows: Tensor, out: Tensor) -> None:
    """Sum the rows of matrices (P, R, K, .) with weights (P, R, K) into out (P, R, .)."""
    weights, rows, out = (each.flatten(0, 1) for each in (weights, rows, out))
    torch.bmm(weights[:, None], rows, out=out[:, None])
