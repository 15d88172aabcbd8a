"""Incremental decoding of a batch of sequences: each forward pass reads the new tokens only.

The cache is empty before the first pass, which reads the prompts. Sequences may have unequal
lengths; they are right-padded, so an entry's place in the cache is its position in the sequence.
Attention runs over all stored positions: the logits equal those of a forward pass over the complete
sequences up to rounding. Under tensor parallelism each rank caches its local heads.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.decoding import DecodedSequences, DecodingState
from megagrow.model.layers.table import decoder_blocks


class DecodingCache:
    """Decoding states of the blocks of a model on one rank, for one batch of sequences.

    A pass is `begin`, one forward pass of the model with the cache, `end`.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self.sequences = DecodedSequences(device)
        self._layers: dict[int, Mapping[str, DecodingState]] = {}

    def states(self, layer: int) -> Mapping[str, DecodingState]:
        """Return the states of a layer by block name, which its first call creates."""
        if layer not in self._layers:
            self._layers[layer] = {
                block.name: block.type.decoding_state(self.sequences)
                for block in decoder_blocks(self._config, layer)
                if block.type.decoding_state is not None
            }
        return self._layers[layer]

    def begin(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Start a pass over the new tokens of each sequence.

        Returns their ids, right-padded with zeros: (B, S) int64.
        """
        self.sequences.begin([len(tokens) for tokens in new])
        width = self.sequences.columns
        rows = [[*tokens, *[0] * (width - len(tokens))] for tokens in new]
        return torch.tensor(rows, device=self._device)

    def end(self) -> None:
        """Finish the pass."""
        self.sequences.end()

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the sequences that are not in `rows`, in ascending order, between two passes."""
        self.sequences.keep(rows)
        index = torch.tensor(rows, device=self._device)
        for states in self._layers.values():
            for state in states.values():
                state.keep(index)
