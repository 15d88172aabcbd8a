"""What autograd keeps of a micro batch on one rank, and what head and loss take.

It follows the code of the model. Between the operations stand the tensors that a backward pass
needs; each is counted once, in the place where it is kept. Not counted: what lives within one
operation of one layer, masks of documents, and masks of parts that are still being let in.
"""

from dataclasses import dataclass

from megagrow.config.schema import StageConfig
from megagrow.model.ops import TORCH_LOSS, TRITON_CHUNKS
from megagrow.parallel.loss import chunk_size
from megagrow.reshard.layout import Layout


@dataclass(frozen=True)
class Activations:
    """Bytes on the tensor-parallel rank that holds most, for one micro batch.

    `auto` is taken as torch's operations: attention that keeps no S x S matrix, and norms that keep
    their input on a GPU, and one tensor more on a CPU.
    """

    stage: StageConfig
    layout: Layout
    sequence_length: int
    bf16: bool
    on_cpu: bool

    @property
    def all_layers(self) -> int:
        """What all layers keep, nothing computed twice."""
        return self.stage.model.num_hidden_layers * self._layer + self._ends

    @property
    def inputs_only(self) -> int:
        """With `activation_checkpointing: full`: the input of each layer."""
        return self.stage.model.num_hidden_layers * self._residual + self._ends

    @property
    def used(self) -> int:
        """By the stage's settings, where the loss is computed. `selective` saves what attention
        keeps by S x S."""
        return self.inputs_only if self._recompute == "full" else self.all_layers

    @property
    def first_layer(self) -> int:
        """Of what is left where the backward pass has come to the first layer: what that keeps, or
        has computed again, and its input."""
        return self._layer + (self._residual if self._recompute == "full" else 0)

    @property
    def logits(self) -> int:
        """Of head and loss together, where they hold most."""
        spec = self.layout.plan["model.embed_tokens.weight"]
        rows = spec.padded_rows // self.layout.tp
        kernels = self.stage.kernels
        if not kernels.linear_cross_entropy:
            return self._tokens * rows * self._each_logit
        hidden = self.stage.model.hidden_size
        chunks = TRITON_CHUNKS if kernels.loss == "triton" else TORCH_LOSS.chunks
        chunk = chunk_size(self._tokens, chunks) * rows * self._each_logit
        weight = 4 if self.layout.zero_stage == 0 else self._width
        return chunk + self._tokens * hidden * self._width + rows * hidden * weight

    @property
    def _each_logit(self) -> int:
        """Bytes per logit: itself; by torch also itself in fp32 and, of the exponentials or their
        gradient, another one. fp32 logits are no copy, unless padding is taken out of them."""
        if self.stage.kernels.loss == "triton":
            return self._width
        spec = self.layout.plan["model.embed_tokens.weight"]
        copied = self.bf16 or spec.padded_rows > spec.rows
        return self._width + (8 if copied else 4)

    @property
    def _recompute(self) -> str:
        return self.stage.parallel.activation_checkpointing

    @property
    def _width(self) -> int:
        """Bytes of a number in the forward pass."""
        return 2 if self.bf16 else 4

    @property
    def _tokens(self) -> int:
        """Tokens of a micro batch."""
        return self.stage.batch.micro_batch_size * self.sequence_length

    @property
    def _residual(self) -> int:
        """The residual stream, as it stands between two blocks."""
        split = self.layout.tp if self.stage.parallel.sequence_parallel else 1
        return self._tokens * self.stage.model.hidden_size * self._width // split

    @property
    def _normed(self) -> int:
        """Of a norm, besides its result: its input, and where the norm is none that is fused (that
        of torch on a CPU) the input over its root mean square, too."""
        composed = self.on_cpu and self.stage.kernels.norm != "triton"
        return 2 * self._residual if composed else self._residual

    @property
    def _ends(self) -> int:
        """Around the layers: what the last norm keeps, and the input of the head."""
        return self._normed + self._tokens * self.stage.model.hidden_size * self._width

    @property
    def _layer(self) -> int:
        """Of one layer: both norms, whose results are whole on every tensor-parallel rank, and
        split over them attention, and gate, silu(gate), up and their product."""
        model = self.stage.model
        normed = 2 * model.hidden_size * self._tokens * self._width
        mlp = 4 * model.intermediate_size * self._tokens * self._width
        return 2 * self._normed + normed + (self._attention + mlp) // self.layout.tp

    @property
    def _attention(self) -> int:
        """Of all heads: q, k, v and the result, and an fp32 normaliser for each query; by the
        reference the fp32 matrix of probabilities, k and v repeated, and the mask."""
        model = self.stage.model
        queries, keys = model.num_attention_heads, model.num_key_value_heads
        per_token = self._tokens * model.head_dim
        if self.stage.kernels.attention != "reference":
            normaliser = 4 * queries * self._tokens
            return 2 * (queries + keys) * per_token * self._width + normaliser
        operands = queries * per_token * (3 * 4 + self._width)
        if self._recompute == "selective":
            return 2 * (queries + keys) * per_token * self._width
        square = self._tokens * self.sequence_length
        return operands + square * (4 * queries + self.layout.tp)
