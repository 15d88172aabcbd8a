"""Engine settings of a stage, optimizer groups, and DeepSpeed's configuration. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megagrow.config.schema import BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megagrow.model.ops import PLAIN, Ops
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import ParamSpec


@dataclass(frozen=True)
class ParamScale:
    """Factors on one parameter's hyper-parameters after a growth.

    They keep a grown model on the trajectory of its source: lr / k_in, weight decay * k_in,
    eps / k_out (docs/reference/operators.md).
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    norm: float = 1.0
    """Weight of the squared gradient norm in the global norm: k_out / k_in."""

    def times(self, other: "ParamScale") -> "ParamScale":
        """Return the product of the factors of two consecutive growths."""
        return ParamScale(
            self.lr * other.lr,
            self.weight_decay * other.weight_decay,
            self.eps * other.eps,
            self.norm * other.norm,
        )


UNSCALED = ParamScale()
"""Scale with all factors equal to 1."""


@dataclass(frozen=True)
class EngineSettings:
    """Settings that determine how one stage is trained, given its initial state."""

    model: ModelConfig
    parallel: ParallelConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    bf16: bool
    scales: Mapping[str, ParamScale] = field(default_factory=dict)
    """Hyper-parameter factors by parameter; 1 without an entry."""
    ops: Ops = PLAIN
    """Backends of the model's operations."""


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share all hyper-parameters."""

    names: tuple[str, ...]
    decays: bool
    scale: ParamScale

    def hyper_parameters(self, optimizer: OptimizerConfig, lr: float) -> dict[str, float]:
        """Return AdamW's options of this group at the run's learning rate `lr`."""
        decay = optimizer.weight_decay if self.decays else 0.0
        return {
            "lr": lr * self.scale.lr,
            "weight_decay": decay * self.scale.weight_decay,
            "eps": optimizer.eps * self.scale.eps,
        }


def parameter_groups(
    plan: dict[str, ParamSpec], optimizer: OptimizerConfig, scales: Mapping[str, ParamScale]
) -> tuple[ParamGroup, ...]:
    """Return the optimizer's groups: first those with weight decay, then those without.

    Parameters of equal scale form one group, in the order of their first parameter in the plan;
    without scales there is one group of each kind. Raises ValueError for unknown parameters.
    """
    unknown = scales.keys() - plan.keys()
    if unknown:
        raise ValueError(f"scales of unknown parameters: {', '.join(sorted(unknown))}")
    members: dict[tuple[bool, ParamScale], list[str]] = {}
    for decays in (True, False):
        for name, spec in plan.items():
            if decays == (optimizer.weight_decay_on == "all" or not spec.is_vector):
                members.setdefault((decays, scales.get(name, UNSCALED)), []).append(name)
    return tuple(ParamGroup(tuple(names), *kind) for kind, names in members.items())


def reduce_bucket(plan: dict[str, ParamSpec], tp: int) -> int:
    """Return DeepSpeed's bucket size in elements: the model's slice, at most 200M."""
    slice_numel = sum(spec.slice_numel(tp) for spec in plan.values())
    return min(slice_numel + slice_numel % 2, 200_000_000)  # larger buckets are not faster


def deepspeed_config(
    settings: EngineSettings, topology: Topology, plan: dict[str, ParamSpec]
) -> dict[str, Any]:
    """Return DeepSpeed's configuration; `plan` is the model's `parameter_plan`."""
    batch = settings.batch
    bucket = reduce_bucket(plan, topology.tp)
    stage = settings.parallel.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # ZeRO 1 and 2 reduce all gradients on all ranks with either setting; False is in place.
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
        # DeepSpeed's CPU Adam must be compiled on the host; torch's is also vectorized.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        # The timer waits for the GPU twice per micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
