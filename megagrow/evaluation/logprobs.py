"""Log-probabilities of tokens, and greedy decoding.

Log-probabilities are computed from the hidden states of the queried positions: the head is applied
to these positions only, in chunks. The vocabulary may be sharded over tensor-parallel ranks; logits
are never gathered.
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
"""Rows of logits in memory at a time."""


@dataclass(frozen=True)
class TokenQuery:
    """P positions of a batch and the N next tokens to score there, on the model's device."""

    rows: Tensor
    """(P,) int64: indices of sequences in the batch."""
    columns: Tensor
    """(P,) int64: positions within the sequences."""
    owners: Tensor
    """(N,) int64, ascending: index into `rows` and `columns` of each token's position."""
    labels: Tensor
    """(N,) int64: token ids to score."""


class ForwardModel(Protocol):
    """Forward pass of a model: loaded from a checkpoint, or in training."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without padding."""

    def forward_head(self, ids: Tensor, head: HeadLoss) -> None:
        """Call `head` with the hidden states of (B, S) int64 token ids and the head's weight.

        Collective over the tensor-parallel group.
        """

    def finish(self) -> None:
        """Return when all ranks have called it. Called by each rank after its last pass."""


class TokenScorer(Protocol):
    """Interface of `ModelScorer`."""

    def greedy_tokens(self, sequences: list[list[int]]) -> list[int]:
        """Return the most likely next token of each sequence."""

    def scores(
        self, sequences: list[list[int]], query: TokenQuery
    ) -> tuple[list[float], list[bool]]:
        """Return two lists with one entry per queried token (N).

        These are the log-probabilities in nats (fp32), and True for tokens that are the most likely
        ones at their position.
        """

    def finish(self) -> None:
        """Return when all ranks have called it, see `ForwardModel.finish`."""


class ModelScorer:
    """Token scores of a model. Methods are collective over the tensor-parallel group."""

    def __init__(self, model: ForwardModel, topology: Topology) -> None:
        self._model = model
        self._topology = topology

    def greedy_tokens(self, sequences: list[list[int]]) -> list[int]:
        """Return the most likely next token of each sequence."""
        ids = self._pad(sequences)
        device = ids.device
        rows = torch.arange(len(sequences), device=device)
        columns = torch.tensor([len(sequence) - 1 for sequence in sequences], device=device)
        none = rows.new_empty(0)
        _, best = self._run(ids, TokenQuery(rows, columns, none, none))
        return [int(token) for token in best.tolist()]

    def scores(
        self, sequences: list[list[int]], query: TokenQuery
    ) -> tuple[list[float], list[bool]]:
        """Return two lists with one entry per queried token (N).

        These are the log-probabilities in nats (fp32), and True for tokens that are the most likely
        ones at their position.
        """
        scores, best = self._run(self._pad(sequences), query)
        return scores.tolist(), (best[query.owners] == query.labels).tolist()

    def finish(self) -> None:
        """Return when all ranks have called it, see `ForwardModel.finish`."""
        self._model.finish()

    @torch.no_grad()
    def _run(self, ids: Tensor, query: TokenQuery) -> tuple[Tensor, Tensor]:
        """Return the queried tokens' scores (N,) fp32 and the most likely tokens (P,) int64."""
        results: list[tuple[Tensor, Tensor]] = []

        def score(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
            picked_PD = hidden_BSD[query.rows, query.columns]
            for first in range(0, len(picked_PD), POSITIONS_AT_ONCE):
                part = picked_PD[first : first + POSITIONS_AT_ONCE]
                stop = first + len(part)
                bounds = torch.tensor([first, stop], device=ids.device)
                begin, end = torch.searchsorted(query.owners, bounds).tolist()
                logits = F.linear(part, weight_VD)
                owners, labels = query.owners[begin:end] - first, query.labels[begin:end]
                results.append(self._score_logits(logits, owners, labels))
            return picked_PD.new_zeros(())

        self._model.forward_head(ids, score)
        scores, best = zip(*results, strict=True)
        return torch.cat(scores), torch.cat(best)

    def _score_logits(
        self, logits: Tensor, owners: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the labels' scores (N,) fp32 and the most likely tokens (P,) int64.

        `logits` is (P, V/tp).
        """
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
            log_total = torch.logsumexp(self._all_gather(log_total), dim=0)
            # Ties go to the lowest rank, as they go to the lowest index on a single device.
            leader = self._all_gather(top).max(dim=0).indices
            best = self._all_gather(best).gather(0, leader[None])[0]
        return targets - log_total[owners], best

    def _all_gather(self, values: Tensor) -> Tensor:
        """Stack the values of all tensor-parallel ranks to (tp, ...)."""
        parts = [torch.empty_like(values) for _ in range(self._topology.tp)]
        dist.all_gather(parts, values.contiguous(), group=self._topology.tp_group)
        return torch.stack(parts)

    def _pad(self, sequences: list[list[int]]) -> Tensor:
        """Right-pad to (B, S) int64; causal attention excludes the padding."""
        length = max(map(len, sequences))
        rows = [sequence + [0] * (length - len(sequence)) for sequence in sequences]
        return torch.tensor(rows, device=self._topology.device)


@dataclass
class Generation:
    """One text during generation."""

    context: list[int]
    """Token ids of the prompt."""
    stop_strings: tuple[str, ...]
    """The text ends before the first occurrence of any of these."""
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    """Generated token ids, without the end-of-document token."""
    result: str | None = None
    """The generated text; None until it is complete."""

    def add(self, token: int, eos: int, decode: Callable[[list[int]], str]) -> None:
        """Append the next token and set `result` if the text is complete."""
        if token != eos:
            self.tokens.append(token)
        text = decode(self.tokens)
        ends = [text.index(stop) for stop in self.stop_strings if stop in text]
        if ends or token == eos or len(self.tokens) == self.max_tokens:
            self.result = text[: min(ends)] if ends else text


def generate_greedily(
    batch: list[Generation], scorer: TokenScorer, eos: int, decode: Callable[[list[int]], str]
) -> None:
    """Generate a batch of texts to completion, without a KV cache.

    Each new token is a forward pass over all tokens of its sequence. Collective over the
    tensor-parallel group.
    """
    while active := [text for text in batch if text.result is None]:
        tokens = scorer.greedy_tokens([text.context + text.tokens for text in active])
        for text, token in zip(active, tokens, strict=True):
            text.add(token, eos, decode)
