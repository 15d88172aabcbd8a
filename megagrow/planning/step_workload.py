"""Workload of one GPU in a training step: the sizes that determine the step time."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megagrow.config.schema import ModelConfig, StageConfig
from megagrow.model.layers.base import READS_RESIDUAL, LayerType
from megagrow.model.layers.table import HEAD, block_counts
from megagrow.parallel.engine_config import bucket_elements

AttentionKernel = Literal["flash1", "flash2", "flash3"]

Stack = Literal["eager", "fused", "compiled"]
"""Implementation of memory-bound operations: single PyTorch calls, fused kernels launched from
Python (as here), or torch.compile."""


@dataclass(frozen=True)
class Shape:
    """Decoder and sequence length."""

    model: ModelConfig
    sequence: int
    blocks: Counter[LayerType]
    """Blocks of all layers."""

    @property
    def parameters(self) -> int:
        """Return the number of parameters, without the norms outside of blocks."""
        tables = 1 if self.model.tie_word_embeddings else 2
        blocks = sum(count * each.numel(self.model) for each, count in self.blocks.items())
        return blocks + tables * HEAD.numel(self.model)

    @property
    def flops_per_token(self) -> int:
        """Return the training FLOPs per token, as counted by `layers.flops.flops_per_token`."""
        blocks = sum(
            count * (each.matmul_flops(self.model) + each.score_flops(self.model, self.sequence))
            for each, count in self.blocks.items()
        )
        return blocks + HEAD.matmul_flops(self.model)


def block_products(layer_type: LayerType, model: ModelConfig, tp: int) -> Iterator[tuple[int, int]]:
    """Yield (columns of the result, inner dimension) of each product of a block on one rank."""
    joint: list[tuple[int, int]] = []
    single: list[tuple[int, int]] = []
    for parameter in layer_type.parameters(model):
        if parameter.is_depthwise or not parameter.matmul_flops(model):
            continue
        size = parameter.slice_shape(model, tp)
        reads = parameter.col_role == READS_RESIDUAL
        (joint if reads and layer_type.joint_inputs else single).append(size)
    if joint:
        yield sum(rows for rows, _ in joint), model.hidden_size
    yield from single


@dataclass(frozen=True)
class StepWorkload:
    """Training step of one GPU out of dp x tp."""

    shape: Shape
    dp: int
    tp: int
    zero_stage: int
    micro_batch: int
    """Sequences of one data-parallel rank per micro-batch."""
    accumulation: int
    recomputed: float = 0.0
    """Recomputed share of the layers' forward pass: 1 with full activation checkpointing."""
    recomputes_rows: bool = False
    """True if norms and activations are recomputed: selective activation checkpointing."""
    sequence_parallel: bool = False
    attention: AttentionKernel = "flash2"
    stack: Stack = "fused"
    overlap_grad_reduce: bool = True
    """True if gradients are reduced during the backward pass."""
    overlap_param_gather: bool = True
    """True if weights are gathered during the forward pass."""
    hpz: int = 1
    """Ranks from which ZeRO 3 gathers weights after the first forward pass of a step; 1: all."""
    gradient_bytes: int = 2
    """Bytes of a gradient element in communication."""
    gradient_buckets: int = 1
    """Collectives into which ZeRO 1 and 2 divide a reduction of all gradients."""

    @property
    def gpus(self) -> int:
        return self.dp * self.tp

    @property
    def micro_tokens(self) -> int:
        """Return the tokens of one micro-batch of one data-parallel rank."""
        return self.micro_batch * self.shape.sequence

    @property
    def step_tokens(self) -> int:
        """Return the tokens of a step on all GPUs."""
        return self.micro_tokens * self.accumulation * self.dp

    @property
    def rank_parameters(self) -> int:
        """Return the parameters of one tensor-parallel rank, before ZeRO partitions them."""
        return self.shape.parameters // self.tp


def shape_of(model: ModelConfig, sequence_length: int) -> Shape:
    """Return the sizes of a model of this project."""
    blocks: Counter[LayerType] = Counter()
    for block, count in block_counts(model).items():
        blocks[block.type] += count
    return Shape(model, sequence_length, blocks)


def step_workload(stage: StageConfig, world_size: int, hopper: bool) -> StepWorkload:
    """Return the workload of one GPU in a step of a stage on `world_size` GPUs.

    The stage's settings must be valid for `world_size`. Gradient reduction overlaps the backward
    pass except under ZeRO 0, as in `parallel.flat_gradients` and DeepSpeed's ZeRO 3; ZeRO 1 and 2
    gather the weights at the end of the step.
    """
    parallel, batch = stage.parallel, stage.batch
    tp, zero = parallel.tensor_model_parallel_size, parallel.zero_stage
    dp = world_size // tp
    shape = shape_of(stage.model, stage.data.sequence_length)
    bucket = bucket_elements(shape.parameters // tp, zero)
    return StepWorkload(
        shape=shape,
        dp=dp,
        tp=tp,
        zero_stage=zero,
        micro_batch=batch.micro_batch_size,
        accumulation=batch.global_batch_size // (batch.micro_batch_size * dp),
        recomputed=1.0 if parallel.activation_checkpointing == "full" else 0.0,
        recomputes_rows=parallel.activation_checkpointing == "selective",
        sequence_parallel=parallel.sequence_parallel,
        attention="flash3" if hopper else "flash2",
        overlap_grad_reduce=zero > 0,
        overlap_param_gather=zero == 3,
        hpz=parallel.zero_hpz_partition_size,
        gradient_bytes=parallel.communication_bytes,
        gradient_buckets=-(-shape.parameters // (tp * bucket)),
    )
