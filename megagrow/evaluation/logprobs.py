"""Log-probabilities of requested tokens, and greedy decoding.

The head is applied to the requested positions only, a chunk at a time; the vocabulary may be
sharded over tensor-parallel ranks, and its logits are never gathered.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagrow.model.llama import HeadLoss
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import real_rows

POSITIONS_AT_ONCE = 1024
"""Rows of logits that are in memory at a time."""


@dataclass(frozen=True)
class Asked:
    """Positions of a batch, and the tokens asked for there; on the model's device."""

    rows: Tensor
    """(P,) int64: sequences of the batch."""
    columns: Tensor
    """(P,) int64: positions within them."""
    owners: Tensor
    """(N,) int64, ascending: the position, by its place above, of each token asked for."""
    labels: Tensor
    """(N,) int64."""


class Model(Protocol):
    """What tokens are passed through: a model that was loaded, or one that is being trained."""

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows."""

    def pass_through(self, ids: Tensor, head: HeadLoss) -> None:
        """Hands the hidden states of (B, S) int64 token ids and the head's weight to `head`; all
        ranks of a tensor-parallel group together."""

    def finish(self) -> None:
        """Every rank calls it when it has made its passes of a call: it returns when all have."""


class Scores(Protocol):
    """What `Scorer` does, for whoever asks."""

    def best(self, sequences: list[list[int]]) -> list[int]:
        """The likeliest token after each sequence."""

    def scores(self, sequences: list[list[int]], asked: Asked) -> tuple[list[float], list[bool]]:
        """Of each token asked for: its log-probability in nats (fp32), and whether no token is
        likelier."""

    def finish(self) -> None:
        """As that of the model."""


class Scorer:
    """Applies a model to batches of token ids; all ranks of a tensor-parallel group together."""

    def __init__(self, model: Model, topology: Topology) -> None:
        self._model = model
        self._topology = topology

    def best(self, sequences: list[list[int]]) -> list[int]:
        """The likeliest token after each sequence."""
        ids = self._padded(sequences)
        device = ids.device
        rows = torch.arange(len(sequences), device=device)
        columns = torch.tensor([len(sequence) - 1 for sequence in sequences], device=device)
        none = rows.new_empty(0)
        _, best = self._passed(ids, Asked(rows, columns, none, none))
        return [int(token) for token in best.tolist()]

    def scores(self, sequences: list[list[int]], asked: Asked) -> tuple[list[float], list[bool]]:
        """Of each token asked for: its log-probability in nats (fp32), and whether no token is
        likelier."""
        found, best = self._passed(self._padded(sequences), asked)
        return found.tolist(), (best[asked.owners] == asked.labels).tolist()

    def finish(self) -> None:
        """As that of the model."""
        self._model.finish()

    @torch.no_grad()
    def _passed(self, ids: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        results: list[tuple[Tensor, Tensor]] = []

        def score(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
            picked_PD = hidden_BSD[asked.rows, asked.columns]
            for first in range(0, len(picked_PD), POSITIONS_AT_ONCE):
                part = picked_PD[first : first + POSITIONS_AT_ONCE]
                stop = first + len(part)
                bounds = torch.tensor([first, stop], device=ids.device)
                begin, end = torch.searchsorted(asked.owners, bounds).tolist()
                logits = F.linear(part, weight_VD)
                owners, labels = asked.owners[begin:end] - first, asked.labels[begin:end]
                results.append(self._of_logits(logits, owners, labels))
            return picked_PD.new_zeros(())

        self._model.pass_through(ids, score)
        scores, best = zip(*results, strict=True)
        return torch.cat(scores), torch.cat(best)

    def _of_logits(self, logits: Tensor, owners: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N,) fp32 of the labels, and the likeliest tokens (P,) int64, of (P, V/tp)."""
        tp, tp_rank = self._topology.tp, self._topology.tp_rank
        first = tp_rank * logits.shape[1]
        real = real_rows(self._model.vocab_size, logits.shape[1], tp_rank)
        logits = logits[:, :real].float()
        own = labels - first
        mine = (own >= 0) & (own < real)
        targets = logits[owners, own.masked_fill(~mine, 0)].masked_fill(~mine, 0.0)
        log_total, (top, best) = logits.logsumexp(dim=-1), logits.max(dim=-1)
        best = best + first
        if tp > 1:
            dist.all_reduce(targets, group=self._topology.tp_group)
            log_total = torch.logsumexp(self._gathered(log_total), dim=0)
            # Of equal ones the first rank's is taken, as on one device the first of equals is.
            leader = self._gathered(top).max(dim=0).indices
            best = self._gathered(best).gather(0, leader[None])[0]
        return targets - log_total[owners], best

    def _gathered(self, values: Tensor) -> Tensor:
        """(tp, ...) of all tensor-parallel ranks."""
        parts = [torch.empty_like(values) for _ in range(self._topology.tp)]
        dist.all_gather(parts, values.contiguous(), group=self._topology.tp_group)
        return torch.stack(parts)

    def _padded(self, sequences: list[list[int]]) -> Tensor:
        """(B, S) int64; what stands after a sequence is seen by none of its tokens."""
        length = max(map(len, sequences))
        rows = [sequence + [0] * (length - len(sequence)) for sequence in sequences]
        return torch.tensor(rows, device=self._topology.device)


@dataclass
class Generation:
    """A text that is being generated."""

    context: list[int]
    until: tuple[str, ...]
    """Stop strings; the text ends before the first of them."""
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    """Generated tokens."""
    result: str | None = None
    """The generated text, once it is complete."""

    def add(self, token: int, eos: int, decode: Callable[[list[int]], str]) -> None:
        """Append the next token; set `result` if the text is complete."""
        if token != eos:
            self.tokens.append(token)
        text = decode(self.tokens)
        ends = [text.index(stop) for stop in self.until if stop in text]
        if ends or token == eos or len(self.tokens) == self.max_tokens:
            self.result = text[: min(ends)] if ends else text


def generate_greedily(
    batch: list[Generation], scorer: Scores, eos: int, decode: Callable[[list[int]], str]
) -> None:
    """Complete a batch of texts; all ranks of a tensor-parallel group together.

    There is no cache: every token takes a forward pass over all tokens so far.
    """
    while unfinished := [text for text in batch if text.result is None]:
        tokens = scorer.best([text.context + text.tokens for text in unfinished])
        for text, token in zip(unfinished, tokens, strict=True):
            text.add(token, eos, decode)
