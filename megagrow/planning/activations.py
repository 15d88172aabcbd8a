"""Activation memory of the micro-batches in flight on one rank, and memory of head and loss.

Each tensor that autograd keeps between operations of the model is counted once. Layer types declare
the bytes of their blocks (`activation_bytes`). Temporaries within one operation, document masks and
growth masks are not counted.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from megagrow.config.schema import StageConfig
from megagrow.config.stage_length import batch_sizes
from megagrow.model.layers.costs import MicroBatch
from megagrow.model.layers.table import (
    EMBEDDING,
    BlockDeclaration,
    block_counts,
    decoder_blocks,
)
from megagrow.model.ops import TORCH_LOSS, TRITON_CHUNKS
from megagrow.parallel.loss import chunk_size
from megagrow.parallel.pipeline.schedule import rank_order
from megagrow.parallel.pipeline.split import PipelineSplit, pipeline_split
from megagrow.reshard.layout import Layout


class InFlight(NamedTuple):
    """Micro-batches of which a pipeline rank keeps activations, after one of its passes."""

    is_forward: bool
    chunk: int
    """Chunk of the pass."""
    in_flight: tuple[int, ...]
    """Micro-batches by chunk of the rank. Those of a backward pass exclude its own."""


@lru_cache(maxsize=1024)
def states_in_flight(
    rank: int, ranks: int, chunks_per_rank: int, micro_batches: int
) -> frozenset[InFlight]:
    """Return the distinct states of a pipeline rank during a step of a schedule."""
    states, counts = set(), [0] * chunks_per_rank
    for each in rank_order(rank, ranks, chunks_per_rank, micro_batches, trains=True):
        counts[each.chunk // ranks] += 1 if each.is_forward else -1
        states.add(InFlight(each.is_forward, each.chunk, tuple(counts)))
    return frozenset(states)


@dataclass(frozen=True)
class Activations:
    """Bytes of one pipeline rank, of the tensor-parallel rank with the largest share.

    `auto` is counted as torch's operations: attention keeps no S x S matrix, and a norm keeps its
    input.
    """

    stage: StageConfig
    layout: Layout
    bf16: bool
    on_cpu: bool
    pp_rank: int = 0

    def kept(self, checkpointing: str) -> int:
        """Return the most bytes that the backward passes keep of the micro-batches in flight.

        `checkpointing` is a value of `activation_checkpointing`. `full` keeps the input of each
        layer. `selective` keeps neither the outputs of norms before blocks nor the product of
        SwiGLU.
        """
        return self._most(checkpointing, is_forward=True, at_loss=0)

    def at_loss(self, checkpointing: str) -> int:
        """Return the most bytes at the end of a forward pass, with head and loss on the last
        pipeline rank."""
        return self._most(checkpointing, is_forward=True, at_loss=self.logits)

    @property
    def at_end(self) -> int:
        """Return the bytes in use at the end of a backward pass.

        These are the kept or recomputed activations of a layer, its input, and the micro-batches
        that remain in flight. The layer with the largest activations stands for the first one.
        """
        checkpointing = self.stage.parallel.activation_checkpointing
        model, held = self.stage.model, self._split.layers_of(self.pp_rank)
        if not held:
            return 0
        layers = {decoder_blocks(model, layer) for layer in held}
        largest = max(sum(self._block(block, checkpointing) for block in each) for each in layers)
        recomputed = self._residual if checkpointing == "full" else 0
        remaining = self._most(checkpointing, is_forward=False, at_loss=0)
        return largest + recomputed + remaining

    @property
    def holds_loss(self) -> bool:
        """True if the rank computes head and loss."""
        return self._split.last_chunk in self._split.chunks_of(self.pp_rank)

    @cached_property
    def _split(self) -> PipelineSplit:
        return pipeline_split(self.stage.model, self.stage.parallel)

    def _most(self, checkpointing: str, is_forward: bool, at_loss: int) -> int:
        """Return the most bytes after a forward or backward pass, `at_loss` more after the last
        chunk."""
        split, batch = self._split, self.stage.batch
        sizes = [self._chunk(chunk, checkpointing) for chunk in split.chunks_of(self.pp_rank)]
        replicas = self.layout.dp // self.stage.parallel.context_parallel_size
        numbers = {
            max(1, size // (batch.micro_batch_size * replicas)) for size in batch_sizes(batch)
        }
        # A number that the ranks do not divide can have more of them in flight than a larger one.
        return self._received + max(
            sum(count * size for count, size in zip(each.in_flight, sizes, strict=True))
            + (at_loss if each.chunk == split.last_chunk else 0)
            for number in numbers
            for each in states_in_flight(self.pp_rank, split.ranks, split.chunks_per_rank, number)
            if each.is_forward == is_forward
        )

    @property
    def _received(self) -> int:
        """Return the bytes of hidden states and of a gradient that arrive during a pass."""
        return 2 * self._residual if self._split.ranks > 1 else 0

    def _chunk(self, chunk: int, checkpointing: str) -> int:
        """Return the bytes kept of a micro-batch in a chunk, without head and loss."""
        model, layers = self.stage.model, self._split.layers(chunk)
        last = chunk == self._split.last_chunk
        outside = self._outside_layers if last else self._residual  # the output is sent
        if checkpointing == "full":
            return len(layers) * self._residual + outside
        counts = block_counts(model, layers).items()
        return outside + sum(count * self._block(block, checkpointing) for block, count in counts)

    @property
    def logits(self) -> int:
        """Return the peak bytes of the head and the loss together; 0 on other pipeline ranks."""
        if not self.holds_loss:
            return 0
        spec = self.layout.plan[EMBEDDING.name]
        rows = spec.padded_rows // self.layout.tp
        kernels = self.stage.kernels
        if not kernels.linear_cross_entropy:
            return self._tokens * rows * self._bytes_per_logit
        hidden = self.stage.model.hidden_size
        chunks = TRITON_CHUNKS if kernels.loss == "triton" else TORCH_LOSS.chunks
        chunk = chunk_size(self._tokens, chunks) * rows * self._bytes_per_logit
        weight = 4 if self.layout.zero_stage == 0 else self._width
        return chunk + self._tokens * hidden * self._width + rows * hidden * weight

    @property
    def _bytes_per_logit(self) -> int:
        """Return the bytes per logit.

        Torch adds an fp32 copy and one fp32 tensor of exponentials or gradients. fp32 logits are
        copied only to remove padding. On a CPU the copy is made of a few rows at a time, except
        to remove the padding of bf16 logits, and the gradient is converted back to bf16.
        """
        if self.stage.kernels.loss == "triton":
            return self._width
        spec = self.layout.plan[EMBEDDING.name]
        padded = spec.padded_rows > spec.rows
        if self.on_cpu:
            return 10 if self.bf16 and padded else 8
        copied = self.bf16 or padded
        return self._width + (8 if copied else 4)

    @property
    def _width(self) -> int:
        """Return the bytes per element of the forward pass."""
        return 2 if self.bf16 else 4

    @property
    def _tokens(self) -> int:
        """Return the tokens of a micro-batch on one context-parallel rank."""
        tokens = self.stage.batch.micro_batch_size * self.stage.data.sequence_length
        return tokens // self.stage.parallel.context_parallel_size

    @property
    def _residual(self) -> int:
        """Return the bytes of the residual stream between two blocks."""
        split = self.layout.tp if self.stage.parallel.sequence_parallel else 1
        return self._tokens * self.stage.model.hidden_size * self._width // split

    @property
    def _outside_layers(self) -> int:
        """Return the bytes outside the layers: the final norm and the input of the head."""
        return self._residual + self._tokens * self.stage.model.hidden_size * self._width

    def _block(self, block: BlockDeclaration, checkpointing: str) -> int:
        """Return the bytes of a block, of its input, which every rank holds in full, and of the
        input of its norm."""
        model = self.stage.model
        recomputed = checkpointing == "selective" and model.norm_position == "pre"
        complete = 0 if recomputed else model.hidden_size * self._tokens * self._width
        batch = MicroBatch(
            tokens=self._tokens,
            sequence_length=self.stage.data.sequence_length,
            width=self._width,
            tp=self.layout.tp,
            attention=self.stage.kernels.attention,
            pointwise=self.stage.kernels.pointwise,
            scan=self.stage.kernels.scan,
            checkpointing=checkpointing,
            on_cpu=self.on_cpu,
            cp=self.stage.parallel.context_parallel_size,
            cp_comm_type=self.stage.parallel.cp_comm_type,
        )
        split = block.type.activation_bytes(model, batch) // self.layout.tp
        return self._residual + complete + split
