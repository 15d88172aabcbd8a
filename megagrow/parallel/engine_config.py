"""What decides how a stage is trained, and how DeepSpeed is told so. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megagrow.config.schema import BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megagrow.model.ops import PLAIN, Ops
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import ParamSpec


@dataclass(frozen=True)
class ParamScale:
    """Factors on one parameter's hyper-parameters with which a grown model follows its source
    exactly (docs/reference/operators.md: lr / k_in, weight decay * k_in, eps / k_out)."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    norm: float = 1.0
    """Weight of the squared gradient norm in the global norm: k_out / k_in."""

    def times(self, other: "ParamScale") -> "ParamScale":
        """Both, one growth after the other."""
        return ParamScale(
            self.lr * other.lr,
            self.weight_decay * other.weight_decay,
            self.eps * other.eps,
            self.norm * other.norm,
        )


UNSCALED = ParamScale()
"""All factors 1."""


@dataclass(frozen=True)
class EngineSettings:
    """Everything that decides how one stage is trained, besides where its numbers come from."""

    model: ModelConfig
    parallel: ParallelConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    bf16: bool
    scales: Mapping[str, ParamScale] = field(default_factory=dict)
    """Factors on the hyper-parameters of single parameters; 1 without an entry."""
    ops: Ops = PLAIN
    """What computes the operations of the model."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that are trained with the same hyper-parameters."""

    names: tuple[str, ...]
    decays: bool
    scale: ParamScale

    def hyper_parameters(self, optimizer: OptimizerConfig, lr: float) -> dict[str, float]:
        """What AdamW takes for this group where the learning rate of the run is `lr`."""
        decay = optimizer.weight_decay if self.decays else 0.0
        return {
            "lr": lr * self.scale.lr,
            "weight_decay": decay * self.scale.weight_decay,
            "eps": optimizer.eps * self.scale.eps,
        }


def parameter_groups(
    plan: dict[str, ParamSpec], optimizer: OptimizerConfig, scales: Mapping[str, ParamScale]
) -> tuple[ParamGroup, ...]:
    """The optimizer's groups: first those with weight decay, then those without.

    Parameters of one scale make one group, in the order in which the plan first has them; without
    scales there is one group of each kind. Raises ValueError for a scale of no parameter.
    """
    unknown = scales.keys() - plan.keys()
    if unknown:
        raise ValueError(f"scales of no parameter of the model: {', '.join(sorted(unknown))}")
    members: dict[tuple[bool, ParamScale], list[str]] = {}
    for decays in (True, False):
        for name, spec in plan.items():
            if decays == (optimizer.weight_decay_on == "all" or not spec.is_vector):
                members.setdefault((decays, scales.get(name, UNSCALED)), []).append(name)
    return tuple(ParamGroup(tuple(names), *kind) for kind, names in members.items())


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
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # ZeRO 1 and 2 would sum all gradients on all ranks in either case, here where they lie.
        "reduce_scatter": stage == 3,
        "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
    }
    if settings.parallel.offload_optimizer:
        pinned = topology.device.type == "cuda"
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_clipping": settings.optimizer.gradient_clipping if stage > 0 else 0.0,
        "bf16": {"enabled": settings.bf16 and stage > 0, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Its own Adam for CPUs has to be compiled where it runs; torch's is vectorised as well.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
