"""What decides how a stage is trained, and how DeepSpeed is told so. Pure."""

from dataclasses import dataclass
from typing import Any

from megagrow.config.schema import BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megagrow.parallel.plan import ParamSpec
from megagrow.parallel.topology import Topology


@dataclass(frozen=True)
class EngineSettings:
    """Everything that decides how one stage is trained, besides where its numbers come from."""

    model: ModelConfig
    parallel: ParallelConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    bf16: bool


def decay_groups(
    plan: dict[str, ParamSpec], optimizer: OptimizerConfig
) -> tuple[tuple[str, ...], ...]:
    """Names of each optimizer group: those with weight decay, then those without, if any."""
    if optimizer.weight_decay_on == "all":
        return (tuple(plan),)
    decayed = tuple(name for name, spec in plan.items() if not spec.is_vector)
    return decayed, tuple(name for name in plan if name not in decayed)


def reduce_bucket(plan: dict[str, ParamSpec], tp: int) -> int:
    """Elements that DeepSpeed reduces or gathers at once: the slice of the model, or 200M."""
    slice_numel = sum(spec.slice_numel(tp) for spec in plan.values())
    return min(slice_numel + slice_numel % 2, 200_000_000)  # more gains nothing


def deepspeed_config(
    settings: EngineSettings, topology: Topology, plan: dict[str, ParamSpec]
) -> dict[str, Any]:
    """DeepSpeed's configuration, with `parameter_plan`'s plan of the model."""
    batch = settings.batch
    bucket = reduce_bucket(plan, topology.tp)
    stage = settings.parallel.zero_stage
    return {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_clipping": settings.optimizer.gradient_clipping if stage > 0 else 0.0,
        "bf16": {"enabled": settings.bf16 and stage > 0},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
