"""How fast a run computes: by a given utilisation, or as another run was measured."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megagrow.common.gpu_specs import Gpu
from megagrow.errors import ConfigError, DataError
from megagrow.train.reporting.metrics import METRICS_FILE, read_metrics
from megagrow.train.reporting.writers import Record


@dataclass(frozen=True)
class Pace:
    """What all ranks together compute."""

    flops_per_second: float
    """True FLOPs (`config.flops.flops_per_token`)."""
    source: str
    """Where it comes from, for people."""


def pace_of(mfu: float | None, measured: Path | None, gpu: Gpu | None, world: int) -> Pace | None:
    """The pace by `--mfu` or by `--measured`; None where neither is given.

    The utilisation of the measured run is taken over; where that run knew none (on a CPU, or on a
    card without a datasheet here), its FLOP/s are taken as they are, as those of as many ranks.
    InputError where the options do not go together.
    """
    if mfu is not None and measured is not None:
        raise ConfigError("--mfu and --measured each say how fast it goes: give one of them")
    if measured is not None:
        return _measured(measured, gpu, world)
    if mfu is None:
        return None
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu}: should be more than 0 and at most 1, such as 0.4")
    if gpu is None:
        raise ConfigError(
            "--mfu is a share of what a GPU computes: name it with --gpu, such as h100"
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
        f"the median of {len(rates)} steps of {directory}, taken as what as many ranks do{share}",
    )


def _steps(directory: Path) -> list[Record]:
    """Of each train record the MFU, the tokens per second as `pace`, and FLOPs and tokens since the
    record before it in its stage. The first of a stage is left out: compilers and caches."""
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
        raise DataError(f"{path}: no stage has two train records, which tell a run's pace")
    return steps


def _between(before: Record, record: Record) -> list[Record]:
    tokens = record["tokens"] - before["tokens"]
    pace, flops = record.get("tokens_per_second"), record.get("flops_true")
    if tokens <= 0 or not pace or flops is None or before.get("flops_true") is None:
        return []
    passed = {"tokens": tokens, "flops_true": flops - before["flops_true"], "pace": pace}
    return [passed | {"mfu": record.get("mfu")}]
