"""Search for the fastest layouts of a stage that fit a cluster, by the step model."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megagrow.config.parallel_rules import world_problems
from megagrow.config.schema import RunConfig, StageConfig
from megagrow.config.validation import problems
from megagrow.errors import ConfigError
from megagrow.planning.cluster import Cluster
from megagrow.planning.memory import StageMemory
from megagrow.planning.memory_fit import USABLE, on_gpu
from megagrow.planning.prediction import stage_work
from megagrow.planning.step.timing import StepTime, step_time
from megagrow.planning.step.workload import WIDTH, StepWorkload
from megagrow.reshard.layout import Layout, layout_of

MOST_SEQUENCES = 64
"""Maximum sequences per micro-batch; more do not speed up matrix products."""

MOST_PIPELINE_RANKS, MOST_CHUNKS = 16, 4
"""Maximum pipeline-parallel size, and chunks per pipeline rank."""

MOST_SEQUENCES_OF_PIPELINES = 8
"""Maximum sequences per micro-batch of a pipeline; more leave too few micro-batches."""

LEAST_TOKENS = 4096
"""Minimum tokens of a sequence per context-parallel rank, for micro-batches of one sequence."""

_Sizes = dict[str, Any]
"""Keys of `ParallelConfig` and their values."""


@dataclass(frozen=True)
class FittingLayout:
    """Stage with a layout that fits."""

    stage: StageConfig
    step: StepTime
    bytes_per_gpu: int


def fitting_layouts(
    run: RunConfig, index: int, cluster: Cluster, capacity: int, most: int = 12
) -> list[FittingLayout]:
    """Return the fastest layouts of stage `index` that use at most `USABLE` of `capacity` bytes.

    Tensor parallelism stays within a node, with sequence parallelism; the global batch is
    unchanged. Pipelines have at least as many micro-batches as ranks, and ZeRO 1 or 2. Raises
    ConfigError if no layout fits.
    """
    tried = [
        (step_time(work, cluster), stage)
        for stage in _candidates(run, index, cluster)
        if _least_bytes(work := stage_work(stage, cluster)) <= USABLE * capacity
    ]
    tried.sort(key=lambda pair: pair[0].seconds)
    fitting: list[FittingLayout] = []
    too_many: dict[tuple[Any, ...], int] = {}
    layouts: dict[tuple[Any, ...], Layout] = {}
    for step, stage in tried:
        sequences = stage.batch.micro_batch_size
        kind = tuple(getattr(stage.parallel, key) for key in _SEARCHED)
        if sequences >= too_many.get(kind, MOST_SEQUENCES + 1):
            continue
        sizes = kind[:-1]  # without activation checkpointing
        if sizes not in layouts:
            layouts[sizes] = layout_of(stage, cluster.gpus, {})
        held = on_gpu(StageMemory(stage, layouts[sizes], bf16=True).at_peak)
        if held > USABLE * capacity:
            too_many[kind] = sequences
            continue
        fitting.append(FittingLayout(stage, step, held))
        if len(fitting) == most:
            break
    if not fitting:
        raise ConfigError(
            f"--layouts: no layout of stages.{index} fits {cluster.gpus:,} GPUs of "
            f"{capacity / 1e9:.0f} GB with a global batch of "
            f"{run.stages[index].batch.global_batch_size} sequences"
        )
    return fitting


def _least_bytes(work: StepWorkload) -> float:
    """Return a lower bound of the memory of a rank: weights, gradients, and two states."""
    shared = 0 if work.zero_stage == 0 else 8 / work.partition
    weights = WIDTH if work.zero_stage < 3 else 0
    return (shared + weights + (4 if work.zero_stage < 2 else 0)) * work.rank_parameters


def _candidates(run: RunConfig, index: int, cluster: Cluster) -> Iterator[StageConfig]:
    """Yield the stage with each layout that is valid on the cluster."""
    stage = run.stages[index]
    for layout, sequences in _searched(stage, cluster):
        changed = stage.model_copy(
            update={
                "parallel": stage.parallel.model_copy(update=layout | {"offload_optimizer": False}),
                "batch": stage.batch.model_copy(update={"micro_batch_size": sequences}),
            }
        )
        alone = run.model_copy(update={"stages": [changed.model_copy(update={"growth": None})]})
        if not world_problems(alone, cluster.gpus) and not problems(alone):
            yield changed


_SEARCHED = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "zero_stage",
    "activation_checkpointing",
)


def _searched(stage: StageConfig, cluster: Cluster) -> Iterator[tuple[_Sizes, int]]:
    """Yield keys of the parallel section and sequences per micro-batch."""
    batch = stage.batch.global_batch_size
    context = _powers(stage.data.sequence_length // LEAST_TOKENS or 1)
    for tp, cp, (pp, chunks, zero), checkpointing in product(
        _powers(cluster.gpus_per_node),
        list(context),
        list(_pipelines(stage)),
        ("none", "selective", "full"),
    ):
        replicas = cluster.gpus // (tp * cp * pp)
        most = MOST_SEQUENCES if pp == 1 else MOST_SEQUENCES_OF_PIPELINES
        most = most if cp == 1 else 1
        values = (tp, cp, pp, chunks, zero, checkpointing)
        layout = dict(zip(_SEARCHED, values, strict=True)) | {"sequence_parallel": tp > 1}
        for sequences in _powers(most):
            if replicas and batch >= sequences * replicas * pp:
                yield layout, sequences


def _pipelines(stage: StageConfig) -> Iterator[tuple[int, int, int]]:
    """Yield (pipeline-parallel size, chunks per rank, ZeRO stage); chunks have equal layers."""
    yield from ((1, 1, zero) for zero in range(4))
    layers = stage.model.num_hidden_layers
    for pp, chunks, zero in product(_powers(MOST_PIPELINE_RANKS), _powers(MOST_CHUNKS), (1, 2)):
        if pp > 1 and layers and layers % (pp * chunks) == 0:
            yield pp, chunks, zero


def _powers(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2
