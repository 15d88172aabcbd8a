"""Log-probabilities of tokens in given sequences.

They are computed from the hidden states of the queried positions: the head is applied to these
positions only, in chunks.
"""

from bisect import bisect_left
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
    """P positions of a batch and the N next tokens to score there."""

    rows: list[int]
    """(P,): indices of sequences in the batch."""
    columns: list[int]
    """(P,): positions within the sequences."""
    owners: list[int]
    """(N,), ascending: index into `rows` and `columns` of each token's position."""
    labels: list[int]
    """(N,): token ids to score."""


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
    """Token scores of a model. Collective over the tensor- and pipeline-parallel ranks."""

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
        # Scores and flags in one tensor: the host waits for the device once.
        scores, greedy = self._run(self._pad(sequences), query).tolist()
        return scores, [flag == 1.0 for flag in greedy]

    def finish(self) -> None:
        """Return when all ranks have called it, see `ForwardModel.finish`."""
        self._model.finish()

    @torch.no_grad()
    def _run(self, ids: Tensor, query: TokenQuery) -> Tensor:
        """Return (2, N) fp32: the queried tokens' scores, and 1 for the most likely tokens."""
        result = torch.empty((2, len(query.labels)), device=ids.device)
        rows, columns = self._on_device([query.rows, query.columns])
        queried = self._on_device([query.owners, query.labels])

        def score(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
            results, picked_PD = [], hidden_BSD[rows, columns]
            for first in range(0, len(picked_PD), POSITIONS_AT_ONCE):
                part = picked_PD[first : first + POSITIONS_AT_ONCE]
                begin, end = (bisect_left(query.owners, x) for x in (first, first + len(part)))
                logits = F.linear(part, weight_VD)
                owners, labels = queried[0, begin:end] - first, queried[1, begin:end]
                scores, best = self._vocabulary.score(logits, owners, labels)
                results.append(torch.stack([scores, (best[owners] == labels).float()]))
            return torch.cat(results, dim=1)

        self._model.forward_head(ids, score, result)
        return result

    def _pad(self, sequences: list[list[int]]) -> Tensor:
        """Right-pad to (B, S) int64; causal attention excludes the padding."""
        length = max(map(len, sequences))
        rows = [sequence + [0] * (length - len(sequence)) for sequence in sequences]
        return self._on_device(rows)

    def _on_device(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self._topology.device)
