"""Engine settings of a stage, optimizer groups, and DeepSpeed's configuration. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase as fnmatch
from types import MappingProxyType
from typing import Any

from megagrow.config.deepspeed import DeepSpeedConfig
from megagrow.config.schema import BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megagrow.model.layers.base import VOCAB
from megagrow.model.ops import PLAIN, Ops
from megagrow.parallel.optimizers.rules import UNSCALED, MuonRule, ParamScale, UpdateRule
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import ParamSpec

NO_RATES: Mapping[str, float] = MappingProxyType({})

NEWTON_SCHULZ_EPS = 1e-7
"""Smallest norm by which Muon divides an update, as in torch.optim.Muon."""


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
    deepspeed: DeepSpeedConfig | None = None


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share all hyper-parameters."""

    names: tuple[str, ...]
    decays: bool
    scale: ParamScale
    rule: UpdateRule
    rate: str
    """Key of `OptimizerConfig.other_rates`; empty: `lr`."""

    def hyper_parameters(
        self, optimizer: OptimizerConfig, lr: float, others: Mapping[str, float] = NO_RATES
    ) -> dict[str, float]:
        """Return the options of this group at the run's learning rates.

        `others` are the rates of the keys of `other_rates`; `lr` applies without an entry.
        """
        decay = optimizer.weight_decay if self.decays else 0.0
        eps = NEWTON_SCHULZ_EPS if isinstance(self.rule, MuonRule) else optimizer.eps
        return {
            "lr": others.get(self.rate, lr) * self.scale.lr,
            "weight_decay": decay * self.scale.weight_decay,
            "eps": eps * self.scale.eps,
        }


def parameter_groups(
    plan: dict[str, ParamSpec], optimizer: OptimizerConfig, scales: Mapping[str, ParamScale]
) -> tuple[ParamGroup, ...]:
    """Return the optimizer's groups: first those with weight decay, then those without.

    Parameters of equal scale, rule and rate form one group, in the order of their first parameter
    in the plan. Raises ValueError for unknown parameters.
    """
    unknown = scales.keys() - plan.keys()
    if unknown:
        raise ValueError(f"scales of unknown parameters: {', '.join(sorted(unknown))}")
    members: dict[tuple[bool, ParamScale, UpdateRule, str], list[str]] = {}
    for decays in (True, False):
        for name, spec in plan.items():
            if decays == _decays(spec, optimizer):
                kind = decays, scales.get(name, UNSCALED), spec.rule, rate_of(spec, optimizer)
                members.setdefault(kind, []).append(name)
    return tuple(ParamGroup(tuple(names), *kind) for kind, names in members.items())


def groups_within(groups: Sequence[ParamGroup], plan: Collection[str]) -> tuple[ParamGroup, ...]:
    """Return the groups without the parameters that are not in a plan."""
    kept = (tuple(name for name in group.names if name in plan) for group in groups)
    pairs = zip(groups, kept, strict=True)
    return tuple(replace(group, names=names) for group, names in pairs if names)


def _decays(spec: ParamSpec, optimizer: OptimizerConfig) -> bool:
    excluded = any(fnmatch(spec.name, pattern) for pattern in optimizer.weight_decay_exclude)
    return not excluded and (optimizer.weight_decay_on == "all" or spec.decays)


def rate_of(spec: ParamSpec, optimizer: OptimizerConfig) -> str:
    """Return the key of the parameter's learning rate; empty: `lr`."""
    of_vocabulary = spec.row_role.axis == VOCAB
    keys = ["decoupled"] if of_vocabulary else []
    keys += [] if isinstance(spec.rule, MuonRule) else ["adamw"]
    return next((key for key in keys if key in optimizer.other_rates), "")


GATHER_BYTES = 64 * 2**20
"""Bytes of forward weights that ZeRO 1 and 2 gather at a time on CPUs: gloo gathers into a copy."""


def reduce_bucket(plan: dict[str, ParamSpec], tp: int, zero_stage: int) -> int:
    """Return `bucket_elements` of a model's slice."""
    return bucket_elements(sum(spec.slice_numel(tp) for spec in plan.values()), zero_stage)


def bucket_elements(slice_numel: int, zero_stage: int) -> int:
    """Return the elements of gradients that are reduced at a time.

    ZeRO 1 and 2: an eighth of the model's slice, at most 25M, so that the reduction overlaps the
    backward pass. ZeRO 3: the slice, at most 50M. Larger buckets are not faster.
    """
    if zero_stage == 3:
        return min(slice_numel + slice_numel % 2, 50_000_000)
    return min(-(-slice_numel // 8), 25_000_000)


def deepspeed_config(
    settings: EngineSettings, topology: Topology, plan: dict[str, ParamSpec]
) -> dict[str, Any]:
    """Return DeepSpeed's configuration (ZeRO 1, 2, 3); `plan` is the model's `parameter_plan`."""
    batch = settings.batch
    stage = settings.parallel.zero_stage
    bucket = reduce_bucket(plan, topology.tp, stage)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "zero_hpz_partition_size": settings.parallel.zero_hpz_partition_size,
        "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
    }
    if settings.deepspeed is not None:
        zero |= settings.deepspeed.zero_optimization.model_dump(exclude_none=True)
    if settings.parallel.offload_optimizer:
        pinned = topology.device.type != "cpu"
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return {
        # DeepSpeed counts context-parallel ranks as data-parallel ones.
        "train_batch_size": batch.global_batch_size * topology.cp,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_clipping": settings.optimizer.gradient_clipping,
        "bf16": {"enabled": settings.bf16, "check_grad_overflow": True},
        "communication_data_type": settings.parallel.communication_data_type,
        # fp32 would select DeepSpeed's BF16_Optimizer under ZeRO 1; `FlatGradients` sums in fp32.
        "data_types": {} if stage in (1, 2) else {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's CPU Adam must be compiled on the host; torch's is also vectorized.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        # The timer waits for the GPU twice per micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
