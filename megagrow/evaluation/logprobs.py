"""Log-probabilities of tokens in given sequences.

They are computed from the hidden states of the queried positions: the head is applied to these
positions only, in chunks.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.evaluation.decoder import Decoder, TokenDecoder
from megagrow.evaluation.forward_model import ForwardModel, VocabShard
from megagrow.parallel.process_groups import Topology

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


class TokenScorer(Protocol):
    """Interface of `ModelScorer`."""

    def decode(self, prompts: list[list[int]]) -> TokenDecoder:
        """Return the decoder of a batch of texts; no prompt is empty."""

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
        self._vocabulary = VocabShard(model.config.vocab_size, topology)

    def decode(self, prompts: list[list[int]]) -> TokenDecoder:
        """Return the decoder of a batch of texts; no prompt is empty."""
        return Decoder(self._model, self._topology, prompts)

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
                results.append(self._vocabulary.score(logits, owners, labels))
            return picked_PD.new_zeros(())

        self._model.forward_head(ids, score)
        scores, best = zip(*results, strict=True)
        return torch.cat(scores), torch.cat(best)

    def _pad(self, sequences: list[list[int]]) -> Tensor:
        """Right-pad to (B, S) int64; causal attention excludes the padding."""
        length = max(map(len, sequences))
        rows = [sequence + [0] * (length - len(sequence)) for sequence in sequences]
        return torch.tensor(rows, device=self._topology.device)
