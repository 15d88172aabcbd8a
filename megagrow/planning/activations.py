"""Activation memory of a micro-batch on one rank, and memory of head and loss.

Each tensor that autograd keeps between operations of the model is counted once. Layer types declare
the bytes of their blocks (`activation_bytes`). Temporaries within one operation, document masks and
growth masks are not counted.
"""

from dataclasses import dataclass

from megagrow.config.schema import StageConfig
from megagrow.model.layers.base import MicroBatch
from megagrow.model.layers.table import EMBEDDING, BlockDeclaration, block_counts, distinct_layers
from megagrow.model.ops import TORCH_LOSS, TRITON_CHUNKS
from megagrow.parallel.loss import chunk_size
from megagrow.reshard.layout import Layout


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on the tensor-parallel rank with the largest share.

    `auto` is counted as torch's operations: attention keeps no S x S matrix, and a norm keeps its
    input.
    """

    stage: StageConfig
    layout: Layout
    bf16: bool
    on_cpu: bool

    def at_loss(self, checkpointing: str) -> int:
        """Return the bytes at the loss for a value of `activation_checkpointing`.

        `full` keeps the input of each layer. `selective` keeps neither the outputs of norms before
        blocks nor the product of SwiGLU.
        """
        if checkpointing == "full":
            return self.stage.model.num_hidden_layers * self._residual + self._outside_layers
        counts = block_counts(self.stage.model).items()
        blocks = sum(count * self._block(block, checkpointing) for block, count in counts)
        return blocks + self._outside_layers

    @property
    def largest_layer(self) -> int:
        """Return the bytes in use at the end of the backward pass.

        These are the kept or recomputed activations of a layer, and its input. The layer with the
        largest activations stands for the first one.
        """
        checkpointing, model = self.stage.parallel.activation_checkpointing, self.stage.model
        if model.num_hidden_layers == 0:
            return 0
        layers = distinct_layers(model)
        sizes = (sum(self._block(block, checkpointing) for block in layer) for layer in layers)
        return max(sizes) + (self._residual if checkpointing == "full" else 0)

    @property
    def logits(self) -> int:
        """Return the peak bytes of the head and the loss together."""
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
        """Return the tokens of a micro-batch."""
        return self.stage.batch.micro_batch_size * self.stage.data.sequence_length

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
        )
        split = block.type.activation_bytes(model, batch) // self.layout.tp
        return self._residual + complete + split
