"""Decoding state of blocks: results of earlier passes that a pass over new tokens reads.

A layer type declares its state (`LayerType.decoding_state`). A block finds its own in
`Context.state`.

Shapes: B sequences, S tokens of a pass, T stored positions, H query heads, G key/value heads,
K head dimension, C channels of Mamba.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.model.selective_scan import causal_conv, selective_scan_from

GROWTH = 64
"""Minimum number of positions by which a full key/value buffer grows."""


class DecodedSequences:
    """Lengths of the sequences of a batch, shared by the states of all blocks.

    A pass reads `counts[b]` new tokens of sequence b, right-padded to `columns`. Further columns,
    which sequence parallelism adds, are not stored.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.lengths: list[int] = []
        """Tokens of each sequence read by earlier passes."""
        self.counts: list[int] = []
        """Tokens of each sequence read by the current pass."""
        self._starts = torch.empty(0)
        self.last = torch.empty(0)
        """Column of the last new token of each sequence: (B,) int64."""
        self.places = (torch.empty(0), torch.empty(0))
        """Indices of the new tokens: sequence (B, 1) and position (B, columns), int64."""

    @property
    def stored(self) -> int:
        """Number of positions that earlier passes filled in the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def columns(self) -> int:
        """Number of new tokens of the sequence with most of them."""
        return max(self.counts)

    def begin(self, counts: Sequence[int]) -> None:
        """Start a pass over `counts` new tokens; the first pass sets the number of sequences."""
        self.lengths = self.lengths or [0] * len(counts)
        self.counts = list(counts)
        # One tensor: the host waits for each copy from its memory.
        starts, sizes = torch.tensor([self.lengths, self.counts], device=self._device)
        self._starts, self.last = starts[:, None], sizes - 1
        rows = torch.arange(len(counts), device=self._device)[:, None]
        self.places = (rows, self.positions(self.columns))

    def end(self) -> None:
        """Finish the pass: its tokens are stored."""
        pairs = zip(self.lengths, self.counts, strict=True)
        self.lengths = [length + count for length, count in pairs]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other sequences, between two passes."""
        self.lengths = [self.lengths[row] for row in rows]

    def positions(self, width: int) -> Tensor:
        """Return the positions of `width` columns (B, width) int64.

        Columns after `columns` repeat the last position, so they never exceed the context length.
        """
        columns = torch.arange(width, device=self._device).clamp(max=self.columns - 1)
        return self._starts + columns

    def visible(self, positions: Tensor, window: int | None = None) -> Tensor:
        """Return which stored positions each query reads: (B, S, T) bool, for positions (B, S).

        With a window of w tokens, a query reads itself and the w - 1 tokens before it.
        """
        stored = torch.arange(self.stored + self.columns, device=self._device)
        causal = stored <= positions[..., None]
        return causal if window is None else causal & (stored > positions[..., None] - window)


class DecodingState(ABC):
    """State of one block for a batch of sequences; created empty, filled by the first pass."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Keep these sequences (n,) int64 and drop all others."""


class KeyValueState(DecodingState):
    """Keys and values of all positions so far: of the local heads, after the rotary embedding.

    Position t of a sequence is entry t of the buffers. Entries after the end of a sequence hold
    padding until its later tokens overwrite them; `visible` excludes them.
    """

    def __init__(self, sequences: DecodedSequences) -> None:
        self._sequences = sequences
        self._keys = torch.empty(0)
        self._values = torch.empty(0)

    def attend(
        self,
        attention: Callable[[Tensor, Tensor, Tensor, Any], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
    ) -> Tensor:
        """Store the new keys and values; return the attention to all stored ones (B, S, H, K).

        The first pass calls `attention` on its inputs (`mask` as that requires); later passes have
        a mask (B, S, T) bool.
        """
        sequences, new = self._sequences, self._sequences.columns
        if sequences.stored == 0:
            self._keys, self._values = (x[:, :new].transpose(1, 2) for x in (k, v))
            return attention(q, k, v, mask)
        used = sequences.stored + new
        self._keys = _with_capacity(self._keys, used)
        self._values = _with_capacity(self._values, used)
        rows, positions = sequences.places
        self._keys[rows, :, positions] = k[:, :new]
        self._values[rows, :, positions] = v[:, :new]
        return grouped_attention(q, self._keys[:, :, :used], self._values[:, :, :used], mask)

    def keep(self, rows: Tensor) -> None:
        self._keys, self._values = self._keys[rows], self._values[rows]


class ScanState(DecodingState):
    """State of a Mamba block: last inputs of its convolution, and fp32 state of its scan."""

    def __init__(self, sequences: DecodedSequences) -> None:
        self._sequences = sequences
        self._inputs = torch.empty(0)
        self._state = torch.empty(0)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return `causal_conv` of the new inputs (B, S, C) after the stored ones."""
        kept = weight.shape[1] - 1
        if self._sequences.stored == 0:
            self._inputs = x.new_zeros(x.shape[0], kept, x.shape[2])
        inputs = torch.cat((self._inputs, x), dim=1)
        # Entry t of x is entry t + kept of the inputs, so the last tokens end at `last` + kept.
        last = self._sequences.last[:, None] + 1 + torch.arange(kept, device=x.device)
        self._inputs = inputs.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
        return causal_conv(inputs, weight, bias)[:, kept:]

    def scan(self, x: Tensor, dt: Tensor, A: Tensor, *rest: Tensor) -> Tensor:
        """Return `selective_scan` of the new inputs from the stored state; padding changes no
        state, as its step size is 0."""
        if self._sequences.stored == 0:
            dtype = torch.promote_types(x.dtype, torch.float32)
            self._state = x.new_zeros(x.shape[0], *A.shape, dtype=dtype)
        columns = torch.arange(x.shape[1], device=x.device)
        padding = columns > self._sequences.last[:, None]
        dt = dt.masked_fill(padding[..., None], -torch.inf)
        y, self._state = selective_scan_from(self._state, x, dt, A, *rest)
        return y

    def keep(self, rows: Tensor) -> None:
        self._inputs, self._state = self._inputs[rows], self._state[rows]


def _with_capacity(buffer: Tensor, positions: int) -> Tensor:
    """Return the buffer (B, G, T, K), enlarged by at least half if it has fewer positions."""
    missing = positions - buffer.shape[2]
    if missing <= 0:
        return buffer
    return F.pad(buffer, (0, 0, 0, max(missing, GROWTH, buffer.shape[2] // 2)))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return attention under a mask (B, S, T) bool: q (B, S, H, K), k and v (B, G, T, K).

    The query heads of a group are additional queries of its key/value head, so keys and values are
    not repeated.
    """
    batch, tokens, heads, width = q.shape
    groups = k.shape[1]
    queries = q.unflatten(2, (groups, heads // groups)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    mask = mask.repeat_interleave(heads // groups, dim=1)[:, None]
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask)
    out = out.view(batch, groups, tokens, heads // groups, width).transpose(1, 2)
    return out.reshape(q.shape)
