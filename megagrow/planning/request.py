"""Options and result of `megagrow plan`: ranks, GPUs, throughput and price; its JSON document."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagrow.common.gpu_specs import Gpu, find_gpu
from megagrow.common.sizes import parse_bytes
from megagrow.config.schema import RunConfig
from megagrow.data.stage_streams import epoch_lines
from megagrow.errors import ConfigError, InputError
from megagrow.growth.validation import candidates
from megagrow.planning.cluster import Cluster, find_cluster
from megagrow.planning.cluster_tables import PARTS
from megagrow.planning.costs import (
    KG_CO2_PER_KWH,
    PUE,
    Cost,
    RunCosts,
    make_factors,
    pace_of,
    run_costs,
)
from megagrow.planning.layouts import FittingLayout, fitting_layouts
from megagrow.planning.planner import GrowthPlan, RunPlan, plan_run
from megagrow.planning.prediction import (
    RunPrediction,
    StagePrediction,
    predict_run,
    predicted_pace,
)


@dataclass(frozen=True)
class PlanRequest:
    """Options of `megagrow plan`."""

    world: int | None = None
    """Number of ranks; default: all GPUs of the cluster, or 1."""
    gpu: str | None = None
    gpu_memory: str | None = None
    mfu: float | None = None
    measured: Path | None = None
    watts: float | None = None
    pue: float = PUE
    co2: float = KG_CO2_PER_KWH
    price: float | None = None
    cluster: str | None = None
    layouts: bool = False


@dataclass(frozen=True)
class PlanResult:
    """Result of `megagrow plan`."""

    plan: RunPlan
    costs: RunCosts | None
    """None if the request determines no throughput."""
    prediction: RunPrediction | None = None
    """Set with `--cluster`."""
    layouts: tuple[Sequence[FittingLayout], ...] = ()
    """Layouts of each stage, with `--layouts`."""
    data: tuple[str, ...] = ()
    """Epochs of each training corpus, one line each."""
    capacity: int | None = None
    """Bytes of one GPU, or None if unknown."""

    @property
    def fits(self) -> bool | None:
        """True if the peak of the run fits into a GPU; None if the GPU is unknown."""
        return None if self.capacity is None else self.plan.peak.size <= self.capacity


def plan_request(run: RunConfig, request: PlanRequest) -> PlanResult:
    """Return the plan, its costs, and its prediction on a cluster.

    Raises ConfigError for a run that could not start and for incompatible options.
    """
    cluster = _cluster(request)
    world = request.world
    if world is None:
        world = 1 if cluster is None else cluster.gpus
    gpu = None if request.gpu is None else find_gpu(request.gpu)
    if cluster is not None:
        gpu = cluster.gpu
    capacity = _capacity(request, gpu)
    layouts: tuple[Sequence[FittingLayout], ...] = ()
    if request.layouts and cluster is not None:
        if capacity is None:
            raise ConfigError("--layouts: pass the memory of a GPU with --gpu-memory")
        layouts = tuple(
            fitting_layouts(run, index, cluster, capacity) for index in range(len(run.stages))
        )
    plan = plan_run(run, world, capacity)
    prediction = None if cluster is None else predict_run(plan, cluster)
    return PlanResult(
        plan, _costs(request, plan, gpu, prediction), prediction, layouts, _data(run), capacity
    )


def _data(run: RunConfig) -> tuple[str, ...]:
    """Return the epochs of each corpus as lines; the corpora may not be prepared yet."""
    try:
        return tuple(epoch_lines(run))
    except InputError as error:
        return (f"Epochs of the corpora: unknown, {error}",)


def _costs(
    request: PlanRequest, plan: RunPlan, gpu: Gpu | None, prediction: RunPrediction | None
) -> RunCosts | None:
    factors = make_factors(gpu, request.watts, request.pue, request.co2, request.price)
    pace = pace_of(request.mfu, request.measured, gpu, plan.world_size)
    if pace is None and prediction is not None:
        pace = predicted_pace(plan, prediction)
    if pace is not None:
        return run_costs(plan, pace, factors)
    for option, value in (("--watts", request.watts), ("--price", request.price)):
        if value is not None:
            raise ConfigError(
                f"{option} requires --mfu, --measured or --cluster, which determine the time"
            )
    return None


def _cluster(request: PlanRequest) -> Cluster | None:
    if request.cluster is None:
        if request.layouts:
            raise ConfigError("--layouts requires --cluster, such as h100:8x8")
        return None
    if request.gpu is not None:
        raise ConfigError("--cluster includes the GPU: leave --gpu out")
    cluster = find_cluster(request.cluster)
    if request.world is not None and request.world != cluster.gpus:
        raise ConfigError(
            f"--cluster {request.cluster} has {cluster.gpus:,} GPUs, and a run uses all of them: "
            f"leave --world {request.world} out"
        )
    return cluster


def _capacity(request: PlanRequest, gpu: Gpu | None) -> int | None:
    """Return the bytes of one GPU, or None if unknown."""
    if request.gpu_memory is None:
        return None if gpu is None else gpu.memory
    try:
        return parse_bytes(request.gpu_memory)
    except ValueError as error:
        raise ConfigError(f"--gpu-memory {request.gpu_memory}: {error}") from error


def plan_document(result: PlanResult) -> dict[str, Any]:
    """Return the result as JSON values; values that the options do not determine are None."""
    plan, costs = result.plan, result.costs
    peak = {"bytes": plan.peak.size, "stage": plan.peak.stage, "rank": plan.peak.rank}
    return {
        "name": plan.run.name,
        "world_size": plan.world_size,
        "precision": "bf16" if plan.bf16 else "fp32",
        "fits": result.fits,
        "capacity_bytes": result.capacity,
        "peak": peak,
        "tokens": sum(stage.tokens for stage in plan.stages),
        "flops": float(plan.flops),
        "flops_true": float(sum(stage.flops_true for stage in plan.stages)),
        "pace": None if costs is None else asdict(costs.pace),
        "cost_factors": None if costs is None else asdict(costs.factors),
        "cost": None if costs is None else _cost_values(costs.total),
        "scratch_cost": [_cost_values(cost) for cost in (costs and costs.scratch) or ()],
        "saving": None if plan.saving is None else asdict(plan.saving),
        "stages": [_stage_values(result, index) for index in range(len(plan.stages))],
        "warnings": list(plan.warnings),
        "data": list(result.data),
    }


def _stage_values(result: PlanResult, index: int) -> dict[str, Any]:
    stage, world = result.plan.stages[index], result.plan.world_size
    costs, prediction = result.costs, result.prediction
    layouts = result.layouts[index] if result.layouts else ()
    return {
        "model": stage.config.model.model_dump(mode="json"),
        "parameters": stage.parameters,
        "non_embedding_parameters": stage.non_embedding,
        "tokens": stage.tokens,
        "steps": stage.steps,
        "tokens_per_step": stage.step_tokens,
        "micro_batch_size": stage.config.batch.micro_batch_size,
        "flops": float(stage.flops),
        "flops_true": float(stage.flops_true),
        "lr": stage.optimizer.lr,
        "min_lr": stage.optimizer.min_lr,
        "layout": stage.config.parallel.layout_sizes(world),
        "memory_bytes": stage.memory.parts,
        "growth": None if stage.growth is None else _growth_values(stage.growth),
        "cost": None if costs is None else _cost_values(costs.stages[index]),
        "prediction": None if prediction is None else _prediction_values(prediction.stages[index]),
        "layouts": [_layout_values(each) for each in layouts],
    }


def _cost_values(cost: Cost) -> dict[str, Any]:
    return asdict(cost) | {"tokens_per_second": cost.tokens_per_second}


def _growth_values(growth: GrowthPlan) -> dict[str, Any]:
    return {
        "operators": [list(each.operator) for each in candidates(growth.options)],
        "factor": growth.factor,
        "connection_rate": growth.connection_rate,
        "optimizer_state": growth.state,
        "lr_schedule": growth.options.lr_schedule,
        "advised_tokens": growth.advised_tokens,
        "outside_fit": growth.outside_fit,
        "peak_bytes": growth.peak_bytes,
        "bytes_between_ranks": growth.volume and growth.volume.between_ranks,
        "bytes_between_pipeline_ranks": growth.volume and growth.volume.between_pipeline_ranks,
    }


def _prediction_values(stage: StagePrediction) -> dict[str, Any]:
    parts = {part: getattr(stage.step, part) for part in PARTS.values()}
    return {
        "seconds": stage.seconds,
        "growth_seconds": stage.growth_seconds,
        "step_seconds": stage.step.seconds,
        "parts_seconds": parts | {"zero_hidden": stage.step.zero_hidden},
        "tokens_per_second": stage.tokens_per_second,
        "mfu": stage.step.mfu,
    }


def _layout_values(each: FittingLayout) -> dict[str, Any]:
    parallel = each.stage.parallel
    return {
        **parallel.layout_sizes(each.step.work.gpus),
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "activation_checkpointing": parallel.activation_checkpointing,
        "micro_batch_size": each.step.work.micro_batch,
        "tokens_per_second": each.step.tokens_per_gpu * each.step.work.gpus,
        "mfu": each.step.mfu,
        "step_seconds": each.step.seconds,
        "memory_bytes": each.bytes_per_gpu,
    }
