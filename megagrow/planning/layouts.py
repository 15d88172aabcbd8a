"""Search for the fastest layouts of a stage that fit a cluster, by the step model."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megagrow.config.parallel_rules import world_problems
from megagrow.config.schema import RunConfig, StageConfig
from megagrow.config.validation import problems
from megagrow.errors import ConfigError
from megagrow.planning.cluster import Cluster
from megagrow.planning.memory import stage_memory
from megagrow.planning.memory_fit import USABLE, on_gpu
from megagrow.planning.prediction import stage_work
from megagrow.planning.step.timing import StepTime, step_time

MOST_SEQUENCES = 64
"""Maximum sequences per micro-batch; more do not speed up matrix products."""


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
    unchanged. Raises ConfigError if no layout fits.
    """
    tried = [
        (step_time(stage_work(stage, cluster), cluster), stage)
        for stage in _candidates(run, index, cluster)
    ]
    tried.sort(key=lambda pair: pair[0].seconds)
    fitting: list[FittingLayout] = []
    too_many: dict[tuple[int, int, str], int] = {}
    for step, stage in tried:
        parallel, sequences = stage.parallel, stage.batch.micro_batch_size
        kind = (
            parallel.tensor_model_parallel_size,
            parallel.zero_stage,
            parallel.activation_checkpointing,
        )
        if sequences >= too_many.get(kind, MOST_SEQUENCES + 1):
            continue
        held = on_gpu(stage_memory(stage, cluster.gpus, bf16=True))
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


def _candidates(run: RunConfig, index: int, cluster: Cluster) -> Iterator[StageConfig]:
    """Yield the stage with each layout that is valid on the cluster."""
    stage = run.stages[index]
    tensor = [size for size in _powers(cluster.gpus_per_node) if cluster.gpus % size == 0]
    for tp, zero, checkpointing, sequences in product(
        tensor, range(4), ("none", "selective", "full"), _powers(MOST_SEQUENCES)
    ):
        layout = {
            "tensor_model_parallel_size": tp,
            "sequence_parallel": tp > 1,
            "zero_stage": zero,
            "offload_optimizer": False,
            "activation_checkpointing": checkpointing,
        }
        changed = stage.model_copy(
            update={
                "parallel": stage.parallel.model_copy(update=layout),
                "batch": stage.batch.model_copy(update={"micro_batch_size": sequences}),
            }
        )
        alone = run.model_copy(update={"stages": [changed.model_copy(update={"growth": None})]})
        if not problems(alone) and not world_problems(alone, cluster.gpus):
            yield changed


def _powers(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2
