"""Tables at the end of a GPU check: records in, lines of text out. Pure functions."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tools.gpu.bench.case import OURS, Record
from tools.gpu.bench.goals import NOT_MEASURED, BenchmarkResults, goal_rows
from tools.gpu.check_parts import PartResult

SMOKE = "A smoke run on a CPU: every number below is meaningless."
TableRow = Sequence[str]


def report(
    outcomes: Iterable[PartResult], results: BenchmarkResults, smoke: bool = False
) -> list[str]:
    """Return all tables: results of the parts, goals, then measurements."""
    lines = [SMOKE] if smoke else []
    tables = (
        (("part", "seconds", "result"), part_rows(outcomes, results)),
        (("goal", "bound", "measured", ""), [] if smoke else goal_rows(results)),
        (("kernel", "ours us", "rate", "of ceiling", "speed over baselines"), kernel_rows(results)),
        (("loss memory", "by", "extra MiB", "of logits"), memory_rows(results)),
        (
            ("training", "kernels", "tokens/s", "MFU", "peak GiB", "first s"),
            training_rows(results),
        ),
        (("growth", "seconds", "MiB moved", "peak GiB", "stall s"), growth_rows(results)),
    )
    for heading, rows in tables:
        lines += table(heading, list(rows))
    return lines + problems(results)


def table(heading: TableRow, rows: Sequence[TableRow]) -> list[str]:
    """Return aligned columns under a heading, after an empty line; nothing without rows."""
    if not rows:
        return []
    columns = list(zip(heading, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heading, *rows)
    ]
    return ["", aligned[0], "-" * len(aligned[0]), *aligned[1:]]


def part_rows(outcomes: Iterable[PartResult], results: BenchmarkResults) -> Iterator[TableRow]:
    """Yield the result of each part, with test counts or measured ceilings."""
    for outcome in outcomes:
        words = [outcome.result]
        tests = Counter(test_outcomes(results.of("test", part=outcome.name)).values())
        if tests:
            kinds = ("passed", "failed", "skipped")
            words.append(", ".join(f"{tests[kind]} {kind}" for kind in kinds))
        if results.of("ceiling", part=outcome.name):
            rates = (results.ceiling(name, outcome.name) / 1e12 for name in ("matmul", "copy"))
            words.append("matmul {:.0f} TFLOP/s, copy {:.2f} TB/s".format(*rates))
        yield outcome.name, f"{outcome.seconds:.0f}", "; ".join(words)


def test_outcomes(records: Iterable[Record]) -> dict[str, str]:
    """Return the last outcome of each test, by node id."""
    return {record["name"]: record["outcome"] for record in records if record["kind"] == "test"}


def kernel_rows(results: BenchmarkResults) -> Iterator[TableRow]:
    """Yield megagrow's kernels, with their rate and every baseline's time relative to theirs."""
    for ours in results.timings(by=OURS):
        bound, unit = ("flops", "TFLOP/s") if ours["flops"] else ("bytes", "TB/s")
        rate = ours[bound] / ours["seconds"]
        ceiling = results.ceiling("matmul" if ours["flops"] else "copy", ours["part"])
        same = {key: ours[key] for key in ("op", "case", "way")}
        ratios = [
            f"{other['by']} {other['seconds'] / ours['seconds']:.2f}"
            for other in results.timings(**same)
            if other["by"] != OURS
        ]
        yield (
            f"{ours['op']} {ours['way']}, {ours['case']}",
            f"{1e6 * ours['seconds']:.1f}",
            f"{rate / 1e12:.{0 if ours['flops'] else 2}f} {unit}",
            f"{rate / ceiling:.0%}",
            ", ".join(ratios),
        )


def memory_rows(results: BenchmarkResults) -> Iterator[TableRow]:
    """Yield the extra memory of head and loss."""
    for record in results.of("memory"):
        if "extra_bytes" in record:
            share = record["extra_bytes"] / record["logits_bytes"]
            extra = f"{record['extra_bytes'] / 2**20:.0f}"
            yield record["case"], record["by"], extra, f"{share:.3f}"


def training_rows(results: BenchmarkResults) -> Iterator[TableRow]:
    """Yield throughput and memory of each model and kernel backend."""
    for record in results.of("training"):
        if "seconds" in record:
            yield (
                record["model"],
                record["backend"],
                f"{record['tokens_per_second']:.0f}",
                _format(record["mfu"], "{:.3f}"),
                _format(record["memory_bytes"], "{:.1f}", 2**30),
                f"{record['first_seconds']:.1f}",
            )


def growth_rows(results: BenchmarkResults) -> Iterator[TableRow]:
    """Yield time, traffic and memory of each growth."""
    for record in results.of("growth"):
        yield (
            record["case"],
            f"{record['seconds']:.2f}",
            _format(record["bytes_within_ranks"], "{:.0f}", 2**20),
            _format(record["peak_memory_bytes"], "{:.1f}", 2**30),
            f"{record['stall_seconds']:.2f}",
        )


def problems(results: BenchmarkResults) -> list[str]:
    """Return one line per failed test, failed measurement, and library that is not installed."""
    lines = [f"failed test: {name}" for name in _failed_tests(results)]
    for record in results.records:
        if "problem" in record:
            names = ("op", "way", "case", "model", "by", "backend")
            label = " ".join(str(record[name]) for name in names if name in record)
            lines.append(f"{label}: {record['problem'][:200]}")
    not_installed = sorted({record["library"] for record in results.of("missing")})
    lines += [f"not installed, not compared: {', '.join(not_installed)}"] if not_installed else []
    return ["", *lines] if lines else []


def _format(value: Any, form: str, unit: float = 1.0) -> str:
    return NOT_MEASURED if value is None else form.format(value / unit)


def failures(results: BenchmarkResults) -> list[Record]:
    """Return the failures of megagrow itself. Running out of GPU memory is not one."""
    failed = [
        record
        for record in results.records
        if record.get("by", OURS) == OURS
        and not record.get("problem", "OutOfMemoryError").startswith("OutOfMemoryError")
    ]
    return failed + [{"failed test": name} for name in _failed_tests(results)]


def _failed_tests(results: BenchmarkResults) -> list[str]:
    outcomes = test_outcomes(results.of("test"))
    return [name for name, outcome in outcomes.items() if outcome == "failed"]
