"""Workload of one GPU in a training step: the sizes that determine the step time."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megagrow.config.schema import ModelConfig, StageConfig
from megagrow.model.layers.base import READS_RESIDUAL, LayerType
from megagrow.model.layers.table import HEAD, block_counts
from megagrow.parallel.engine_config import bucket_elements
from megagrow.parallel.pipeline.split import PipelineSplit, pipeline_split

AttentionKernel = Literal["flash1", "flash2", "flash3"]

Stack = Literal["eager", "fused", "compiled"]
"""Implementation of memory-bound operations: single PyTorch calls, fused kernels launched from
Python (as here), or torch.compile."""


WIDTH = 2
"""Bytes of a bf16 element."""


@dataclass(frozen=True)
class Passes:
    """Seconds of all layers, forward and backward, recomputation included."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward

    def recomputed(self, share: float) -> "Passes":
        """Return the passes with a share of the forward pass repeated in the backward pass."""
        return Passes(self.forward, self.backward + share * self.forward)


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
        return self.block_parameters + tables * HEAD.numel(self.model)

    @property
    def block_parameters(self) -> int:
        """Return the number of parameters of all blocks."""
        return sum(count * each.numel(self.model) for each, count in self.blocks.items())

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
    """Training step of one GPU out of dp x cp x pp x tp."""

    shape: Shape
    dp: int
    """Data-parallel size: ranks with different sequences."""
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
    cp: int = 1
    """Context-parallel size."""
    cp_comm_type: str = "all_gather"
    """See `parallel.cp_comm_type`."""
    split: PipelineSplit | None = None
    """Layers of each pipeline rank; None without pipeline parallelism."""

    @property
    def pp(self) -> int:
        """Return the pipeline-parallel size."""
        return 1 if self.split is None else self.split.ranks

    @property
    def gpus(self) -> int:
        return self.dp * self.cp * self.pp * self.tp

    @property
    def partition(self) -> int:
        """Return the ranks over which ZeRO shards: data x context parallel."""
        return self.dp * self.cp

    @property
    def micro_tokens(self) -> int:
        """Return the tokens of one micro-batch of one data- and context-parallel rank."""
        return self.micro_batch * self.shape.sequence // self.cp

    @property
    def layer_shares(self) -> list[float]:
        """Return the fraction of all layers on each pipeline rank."""
        if self.split is None:
            return [1.0]
        held = [len(self.split.layers_of(rank)) for rank in range(self.pp)]
        return [count / max(1, sum(held)) for count in held]

    @property
    def step_tokens(self) -> int:
        """Return the tokens of a step on all GPUs."""
        return self.micro_batch * self.shape.sequence * self.accumulation * self.dp

    @property
    def rank_parameters(self) -> int:
        """Return the parameters of one tensor-parallel rank of the largest pipeline rank, before
        ZeRO partitions them."""
        if self.split is None:
            return self.shape.parameters // self.tp
        shape, shares = self.shape, self.layer_shares
        tables = [0] * self.pp
        for rank in (0, self.pp - 1):
            tables[rank] += HEAD.numel(shape.model)  # a tied head is a copy
        layers = shape.block_parameters
        pairs = zip(shares, tables, strict=True)
        return max(round(share * layers) + table for share, table in pairs) // self.tp


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
    dp = parallel.data_parallel_size(world_size)
    work = StepWorkload(
        shape=shape_of(stage.model, stage.data.sequence_length),
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
        cp=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        split=pipeline_split(stage.model, parallel) if parallel.is_pipeline else None,
    )
    bucket = bucket_elements(work.rank_parameters, zero)
    return replace(work, gradient_buckets=-(-work.rank_parameters // bucket))
