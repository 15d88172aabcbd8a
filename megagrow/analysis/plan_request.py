"""What `megagrow plan` is asked: on how many ranks, which GPUs, how fast, and at what price."""

from dataclasses import dataclass
from pathlib import Path

from megagrow.analysis.costs import KG_CO2_PER_KWH, PUE, RunCosts, make_factors, run_costs
from megagrow.analysis.gpus import Gpu, find_gpu
from megagrow.analysis.pace import pace_of
from megagrow.analysis.planner import RunPlan, plan_run
from megagrow.config.schema import RunConfig
from megagrow.config.sizes import parse_bytes
from megagrow.errors import InputError


@dataclass(frozen=True)
class PlanRequest:
    """The options of the command, as they were given."""

    world: int = 1
    gpu: str | None = None
    gpu_memory: str | None = None
    mfu: float | None = None
    measured: Path | None = None
    watts: float | None = None
    pue: float = PUE
    co2: float = KG_CO2_PER_KWH
    price: float | None = None


def answer(run: RunConfig, request: PlanRequest) -> tuple[RunPlan, RunCosts | None]:
    """The plan, and its costs where the request says how fast it goes.

    InputError for a run that could not start, and for options that make no sense together.
    """
    gpu = None if request.gpu is None else find_gpu(request.gpu)
    plan = plan_run(run, request.world, _capacity(request, gpu))
    factors = make_factors(gpu, request.watts, request.pue, request.co2, request.price)
    pace = pace_of(request.mfu, request.measured, gpu, request.world)
    if pace is None:
        for option, value in (("--watts", request.watts), ("--price", request.price)):
            if value is not None:
                raise InputError(f"{option} needs --mfu or --measured, which say how long it takes")
        return plan, None
    return plan, run_costs(plan, pace, factors)


def _capacity(request: PlanRequest, gpu: Gpu | None) -> int | None:
    """Bytes of one GPU, if they are known."""
    if request.gpu_memory is None:
        return None if gpu is None else gpu.memory
    try:
        return parse_bytes(request.gpu_memory)
    except ValueError as error:
        raise InputError(f"--gpu-memory {request.gpu_memory}: {error}") from error
