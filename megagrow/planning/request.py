"""Options and result of `megagrow plan`: ranks, GPUs, throughput and price."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagrow.common.gpu_specs import Gpu, find_gpu
from megagrow.common.sizes import parse_bytes
from megagrow.config.schema import RunConfig
from megagrow.data.batches import epoch_lines
from megagrow.errors import ConfigError, InputError
from megagrow.planning.cluster import Cluster, find_cluster
from megagrow.planning.costs import KG_CO2_PER_KWH, PUE, RunCosts, make_factors, pace_of, run_costs
from megagrow.planning.layouts import FittingLayout, fitting_layouts
from megagrow.planning.planner import RunPlan, plan_run
from megagrow.planning.prediction import RunPrediction, predict_run, predicted_pace


@dataclass(frozen=True)
class PlanRequest:
    """Options of the command."""

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
class Answer:
    """Result of the command."""

    plan: RunPlan
    costs: RunCosts | None
    """None if the request determines no throughput."""
    prediction: RunPrediction | None = None
    """Set with `--cluster`."""
    layouts: tuple[Sequence[FittingLayout], ...] = ()
    """Layouts of each stage, with `--layouts`."""
    data: tuple[str, ...] = ()
    """Lines on the epochs of the training corpora."""
    capacity: int | None = None
    """Bytes of one GPU, or None if unknown."""

    @property
    def fits(self) -> bool | None:
        """True if the peak of the run fits into a GPU; None if the GPU is unknown."""
        return None if self.capacity is None else self.plan.peak.size <= self.capacity


def answer(run: RunConfig, request: PlanRequest) -> Answer:
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
    return Answer(
        plan, _costs(request, plan, gpu, prediction), prediction, layouts, _data(run), capacity
    )


def _data(run: RunConfig) -> tuple[str, ...]:
    """Return the lines on epochs; a plan may precede the preparation of the corpora."""
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
