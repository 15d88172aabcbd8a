"""Throughput of a run: from a given utilization, or measured in another run."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megagrow.common.gpu_specs import Gpu
from megagrow.errors import ConfigError, DataError
from megagrow.train.reporting.metrics import METRICS_FILE, read_metrics
from megagrow.train.reporting.writers import Record


@dataclass(frozen=True)
class Pace:
    """Throughput of all ranks."""

    flops_per_second: float
    """True FLOPs (`config.flops.flops_per_token`)."""
    source: str
    """Human-readable origin of the value."""


def pace_of(mfu: float | None, measured: Path | None, gpu: Gpu | None, world: int) -> Pace | None:
    """Return the throughput by `--mfu` or `--measured`; None if neither is given.

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
    """Return MFU, tokens per second (`pace`), and FLOPs and tokens since the previous record of the
    stage, for each train record but the first of a stage (compilation, cold caches)."""
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
