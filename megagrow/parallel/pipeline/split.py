"""Assignment of decoder layers to pipeline ranks. Pure.

The layers are divided into chunks of consecutive layers. Chunk i belongs to pipeline rank
i % ranks, so that each rank holds one chunk (1F1B) or several (interleaved 1F1B). The embedding
belongs to the first chunk, the final norm and the head to the last one.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megagrow.config.model import ModelConfig
    from megagrow.config.stage import ParallelConfig


@dataclass(frozen=True)
class PipelineSplit:
    """Layers of each chunk, in the order of the model."""

    ranks: int
    """Pipeline-parallel size."""
    chunks: tuple[int, ...]
    """Number of layers of each chunk; `virtual_pipeline_model_parallel_size` chunks per rank."""

    @property
    def chunks_per_rank(self) -> int:
        """Return the chunks of each rank."""
        return len(self.chunks) // self.ranks

    @property
    def last_chunk(self) -> int:
        """Return the index of the chunk with the final norm and the head."""
        return len(self.chunks) - 1

    def layers(self, chunk: int) -> range:
        """Return the layers of a chunk."""
        return range(self._ends[chunk] - self.chunks[chunk], self._ends[chunk])

    def rank_of_layer(self, layer: int) -> int:
        """Return the pipeline rank that holds a layer."""
        return bisect_right(self._ends, layer) % self.ranks

    def chunks_of(self, rank: int) -> range:
        """Return the chunks of a pipeline rank, in the order of the model."""
        return range(rank, len(self.chunks), self.ranks)

    def layers_of(self, rank: int) -> list[int]:
        """Return the layers of a pipeline rank, in the order of the model."""
        return [layer for chunk in self.chunks_of(rank) for layer in self.layers(chunk)]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.chunks))


def pipeline_split(model: "ModelConfig", parallel: "ParallelConfig") -> PipelineSplit:
    """Return the split of a model that is valid for the settings.

    Chunk i of n gets the layers from floor(i L / n) to floor((i + 1) L / n). With k times as many
    chunks and layers the pattern repeats k times, so a k-fold stack copies every layer within its
    rank, also if n does not divide L. The keys `account_for_embedding_in_pipeline_split` and
    `account_for_loss_in_pipeline_split` count the embedding and the head as one layer each.
    """
    ranks = parallel.pipeline_model_parallel_size
    first = int(parallel.account_for_embedding_in_pipeline_split)
    last = int(parallel.account_for_loss_in_pipeline_split)
    count = ranks * parallel.virtual_pipeline_model_parallel_size
    units = model.num_hidden_layers + first + last
    chunks = [(i + 1) * units // count - i * units // count for i in range(count)]
    chunks[0] -= first
    chunks[-1] -= last
    return PipelineSplit(ranks, tuple(chunks))
