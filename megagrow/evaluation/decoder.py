"""Next tokens of a batch of texts, one forward pass per token, with a key/value cache."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.evaluation.forward_model import ForwardModel, VocabShard
from megagrow.model.decoding import DecodingCache
from megagrow.parallel.process_groups import Topology

TokenChoice = Callable[[Tensor], int]
"""Choice of the next token id of a text from its logits (V,): fp32 on the CPU. All tensor-parallel
ranks of the last pipeline rank call it with the same values and must get the same result."""


class TokenDecoder(Protocol):
    """Interface of `Decoder`."""

    def next_tokens(self, choices: Sequence[TokenChoice | None]) -> list[int]:
        """Choose the next token of each text and append it; None chooses the most likely one."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other texts; `rows` are ascending indices."""


class Decoder:
    """Texts of a batch while they are generated.

    The first pass reads the prompts, later passes read the last token of each text. Methods are
    collective over the tensor- and pipeline-parallel ranks. The caller limits the lengths of texts
    to the context length of the model. The host waits for a GPU once per pass, and for the logits
    of texts with a choice.
    """

    def __init__(
        self, model: ForwardModel, topology: Topology, prompts: Sequence[Sequence[int]]
    ) -> None:
        self._model = model
        self._vocabulary = VocabShard(model.config.vocab_size, topology)
        self._cache = DecodingCache(model.config, topology.device)
        self._unread = [list(prompt) for prompt in prompts]

    @torch.no_grad()
    def next_tokens(self, choices: Sequence[TokenChoice | None]) -> list[int]:
        """Choose the next token of each text and append it; None chooses the most likely one."""
        ids = self._cache.begin(self._unread)
        rows, last = torch.arange(len(ids), device=ids.device), self._cache.sequences.last
        result = rows.new_empty(len(rows))

        def choose(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
            return self._choose(F.linear(hidden_BSD[rows, last], weight_VD), choices)

        self._model.forward_head(ids, choose, result, self._cache)
        self._cache.end()
        tokens: list[int] = result.tolist()
        self._unread = [[token] for token in tokens]
        return tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other texts; `rows` are ascending indices."""
        self._cache.keep(rows)
        self._unread = [self._unread[row] for row in rows]

    def _choose(self, logits: Tensor, choices: Sequence[TokenChoice | None]) -> Tensor:
        """Return one token per row of logits (B, V/tp): (B,) int64."""
        tokens = self._vocabulary.most_likely(logits)
        chosen = {row: choice for row, choice in enumerate(choices) if choice is not None}
        if chosen:
            rows = torch.tensor(list(chosen), device=logits.device)
            gathered = self._vocabulary.gather(logits[rows]).cpu()
            pairs = zip(chosen.values(), gathered, strict=True)
            tokens[rows] = tokens.new_tensor([choice(values) for choice, values in pairs])
        return tokens
