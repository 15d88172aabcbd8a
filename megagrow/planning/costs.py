"""Costs of a run: time, GPU-hours, energy, CO2 and price, from a throughput and stated factors.

Only trained tokens are counted. Growths, checkpoints, validation and steps lost in crashes are not
included.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megagrow.common.gpu_specs import Gpu
from megagrow.errors import ConfigError, DataError
from megagrow.model.layers.flops import flops_per_token
from megagrow.planning.planner import RunPlan
from megagrow.train.reporting.metrics import METRICS_FILE, read_metrics
from megagrow.train.reporting.writers import Record

PUE = 1.2
"""Assumed power usage effectiveness: energy of the data center over that of its computers. Large
operators report averages of 1.08 to 1.18, all data centers 1.54 to 1.59 (sources in
docs/guides/planning.md)."""

KG_CO2_PER_KWH = 0.48
"""Assumed: world average of 2023, all greenhouse gases as CO2 over the life cycle of fuel and plant
(Ember, Global Electricity Review 2024: 480 g). CO2 of power stations alone was 0.445 in 2024 (IEA,
https://www.iea.org/reports/electricity-2025/emissions; see docs/guides/planning.md)."""


@dataclass(frozen=True)
class Pace:
    """Throughput of all ranks."""

    flops_per_second: float
    """True FLOPs (`model.layers.flops.flops_per_token`)."""
    source: str
    """Human-readable origin of the value."""


@dataclass(frozen=True)
class CostFactors:
    """Factors that convert hours to energy, CO2 and price."""

    watts: float | None = None
    """Average power of one GPU; None if unknown."""
    pue: float = PUE
    co2: float = KG_CO2_PER_KWH
    price: float | None = None
    """Price of a GPU-hour, in any currency."""


@dataclass(frozen=True)
class Cost:
    """Costs of one or several stages."""

    tokens: float
    seconds: float
    gpu_hours: float
    kwh: float | None
    co2_kg: float | None
    price: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class RunCosts:
    """Costs of a run, and of its last model trained from scratch."""

    pace: Pace
    factors: CostFactors
    stages: tuple[Cost, ...]
    total: Cost
    scratch: tuple[Cost, Cost] | None
    """Costs to the same loss at the paper's lower and upper speedup.

    None without a published figure (`planner.PlannedSaving`).
    """


def make_factors(
    gpu: Gpu | None, watts: float | None, pue: float, co2: float, price: float | None
) -> CostFactors:
    """Return the factors; `watts` defaults to the GPU's. Raises ConfigError for invalid values."""
    given = {"--watts": watts, "--price": price, "--co2": co2}
    for option, value in given.items():
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"{option} {value}: should be a number of 0 or more")
    if not 1 <= pue < float("inf"):
        raise ConfigError(f"--pue {pue}: should be 1 or more")
    gpu_watts = None if gpu is None else gpu.watts
    return CostFactors(gpu_watts if watts is None else watts, pue, co2, price)


def run_costs(plan: RunPlan, pace: Pace, factors: CostFactors) -> RunCosts:
    """Return the costs of a plan at a throughput of all its ranks."""

    def cost(tokens: float, flops: float) -> Cost:
        return _cost(tokens, flops / pace.flops_per_second, plan.world_size, factors)

    stages = tuple(cost(stage.tokens, stage.flops_true) for stage in plan.stages)
    total = cost(
        sum(stage.tokens for stage in plan.stages), sum(stage.flops_true for stage in plan.stages)
    )
    if plan.saving is None:
        return RunCosts(pace, factors, stages, total, None)
    target = plan.stages[-1]
    true = flops_per_token(target.config.model, target.config.data.sequence_length)
    low, high = (flops / (6 * target.parameters) for flops in plan.saving.scratch_flops)
    return RunCosts(pace, factors, stages, total, (cost(low, low * true), cost(high, high * true)))


def _cost(tokens: float, seconds: float, gpus: int, factors: CostFactors) -> Cost:
    hours = seconds / 3600 * gpus
    kwh = None if factors.watts is None else hours * factors.watts / 1000 * factors.pue
    return Cost(
        tokens=tokens,
        seconds=seconds,
        gpu_hours=hours,
        kwh=kwh,
        co2_kg=None if kwh is None else kwh * factors.co2,
        price=None if factors.price is None else hours * factors.price,
    )


def pace_of(mfu: float | None, measured: Path | None, gpu: Gpu | None, world: int) -> Pace | None:
    """Return the throughput set by `--mfu` or `--measured`; None if neither is given.

    The measured run's utilization is used; if it recorded none (on a CPU, or on a card without a
    datasheet entry), its FLOP/s are used for the same number of ranks. Raises ConfigError for
    incompatible options.
    """
    if mfu is not None and measured is not None:
        raise ConfigError("--mfu and --measured both set the throughput: use one of them")
    if measured is not None:
        return _measured(measured, gpu, world)
    if mfu is None:
        return None
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu}: should be more than 0 and at most 1, such as 0.4")
    if gpu is None:
        raise ConfigError(
            "--mfu is a fraction of a GPU's peak FLOP/s: name the GPU with --gpu, such as h100"
        )
    return Pace(mfu * gpu.peak_flops * world, f"MFU {mfu:.1%} as given")


def _measured(directory: Path, gpu: Gpu | None, world: int) -> Pace:
    steps = _steps(directory)
    shares = [record["mfu"] for record in steps if record.get("mfu")]
    if shares and gpu is not None:
        mfu = median(shares)
        source = f"MFU {mfu:.1%}, the median of {len(shares)} steps of {directory}"
        return Pace(mfu * gpu.peak_flops * world, source)
    rates = [record["flops_true"] / record["tokens"] * record["pace"] for record in steps]
    rate = median(rates)
    share = "" if gpu is None else f" (MFU {rate / (gpu.peak_flops * world):.1%})"
    return Pace(
        rate,
        f"the median of {len(rates)} steps of {directory}, assuming as many ranks{share}",
    )


def _steps(directory: Path) -> list[Record]:
    """Return one record per train record, except the first of a stage (compilation, cold caches).

    A returned record has `mfu`, `pace` in tokens per second, and `tokens` and `flops_true` since
    the previous record of the stage.
    """
    path = directory / METRICS_FILE
    before: Record | None = None
    steps = []
    for record in read_metrics(path):
        if record["kind"] != "train":
            continue
        if before is not None and before.get("stage") == record.get("stage"):
            steps += _between(before, record)
        before = record
    if not steps:
        raise DataError(f"{path}: no stage has two train records, which the throughput requires")
    return steps


def _between(before: Record, record: Record) -> list[Record]:
    tokens = record["tokens"] - before["tokens"]
    pace, flops = record.get("tokens_per_second"), record.get("flops_true")
    if tokens <= 0 or not pace or flops is None or before.get("flops_true") is None:
        return []
    passed = {"tokens": tokens, "flops_true": flops - before["flops_true"], "pace": pace}
    return [passed | {"mfu": record.get("mfu")}]
