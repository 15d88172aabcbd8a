"""What one GPU does in a step: the sizes that its time follows from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megagrow.config.schema import ModelConfig, StageConfig

AttentionKernel = Literal["flash1", "flash2", "flash3"]

Stack = Literal["eager", "fused", "compiled"]
"""Whether what only moves memory is done by single PyTorch calls, by fused kernels that Python
launches (as here), or by what torch.compile makes of the model."""


@dataclass(frozen=True)
class Shape:
    """A decoder, and the length of its sequences."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    sequence: int
    mlp_matrices: int = 3
    """3 with a gate (SwiGLU), 2 without (GELU)."""
    tables: int = 2
    """Embedding and head, or 1 for both."""

    def products(self, tp: int) -> Iterator[tuple[int, int]]:
        """(columns of the result, inner dimension) of each product of a layer on one rank."""
        head = self.head_dim
        yield (self.heads + 2 * self.kv_heads) * head // tp, self.hidden
        yield self.hidden, self.heads * head // tp
        for _ in range(self.mlp_matrices - 1):
            yield self.intermediate // tp, self.hidden
        yield self.hidden, self.intermediate // tp

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer."""
        return sum(columns * inner for columns, inner in self.products(1))

    @property
    def parameters(self) -> int:
        """Of all matrices; vectors are left out."""
        return self.layers * self.layer_parameters + self.tables * self.vocabulary * self.hidden

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs, attention over a causal mask, nothing twice (`train.flops`)."""
        matrices = self.layers * self.layer_parameters + self.vocabulary * self.hidden
        width = self.heads * self.head_dim
        return 6 * matrices + 6 * self.layers * width * (self.sequence + 1)


@dataclass(frozen=True)
class StepWorkload:
    """A step of one GPU out of dp x tp."""

    shape: Shape
    dp: int
    tp: int
    zero_stage: int
    micro_batch: int
    """Sequences of one data-parallel rank at a time."""
    accumulation: int
    recomputed: float = 0.0
    """Share of the layers' forward pass that is done twice: 1 with full checkpointing."""
    sequence_parallel: bool = False
    attention: AttentionKernel = "flash2"
    stack: Stack = "fused"
    overlap: bool = True
    """Whether gradients are reduced, and weights gathered, while others are computed."""
    gradient_bytes: int = 2
    """Of a gradient on the wire."""

    @property
    def gpus(self) -> int:
        return self.dp * self.tp

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro batch of one data-parallel rank."""
        return self.micro_batch * self.shape.sequence

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on all GPUs."""
        return self.micro_tokens * self.accumulation * self.dp

    @property
    def rank_parameters(self) -> int:
        """Parameters of one tensor-parallel rank, before ZeRO divides them."""
        return self.shape.parameters // self.tp


def shape_of(model: ModelConfig, sequence_length: int) -> Shape:
    """The sizes of a model of this project."""
    return Shape(
        layers=model.num_hidden_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        intermediate=model.intermediate_size,
        vocabulary=model.vocab_size,
        sequence=sequence_length,
        tables=1 if model.tie_word_embeddings else 2,
    )


def work_of(
    stage: StageConfig, world_size: int, sequence_length: int, hopper: bool
) -> StepWorkload:
    """A step of a stage on so many GPUs, whose settings must fit.

    Gradients are reduced as DeepSpeed does it by default: beside the backward pass under ZeRO 3
    only. `selective` checkpointing computes nothing twice with attention that keeps no matrix.
    """
    parallel, batch = stage.parallel, stage.batch
    tp, zero = parallel.tensor_model_parallel_size, parallel.zero_stage
    dp = world_size // tp
    return StepWorkload(
        shape=shape_of(stage.model, sequence_length),
        dp=dp,
        tp=tp,
        zero_stage=zero,
        micro_batch=batch.micro_batch_size,
        accumulation=batch.global_batch_size // (batch.micro_batch_size * dp),
        recomputed=1.0 if parallel.activation_checkpointing == "full" else 0.0,
        sequence_parallel=parallel.sequence_parallel,
        attention="flash3" if hopper else "flash2",
        overlap=zero == 3,
        gradient_bytes=4 if zero == 0 else 2,
    )
