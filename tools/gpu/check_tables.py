"""What a check prints last: records in, lines of text out. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tools.gpu.bench.case import OURS, Record
from tools.gpu.bench.goals import NOT_MEASURED, Findings, goal_rows
from tools.gpu.check_parts import Outcome

SMOKE = "A smoke run on a CPU: every number below is meaningless."
Row = Sequence[str]


def report(outcomes: Iterable[Outcome], findings: Findings, smoke: bool = False) -> list[str]:
    """All tables, in the order in which they answer: did it run, is it good, how good."""
    lines = [SMOKE] if smoke else []
    tables = (
        (("part", "seconds", "result"), part_rows(outcomes, findings)),
        (("goal", "bound", "measured", ""), [] if smoke else goal_rows(findings)),
        (("kernel", "ours us", "rate", "of ceiling", "speed over others"), kernel_rows(findings)),
        (("loss memory", "by", "extra MiB", "of logits"), memory_rows(findings)),
        (
            ("training", "kernels", "tokens/s", "MFU", "peak GiB", "first s"),
            training_rows(findings),
        ),
        (("growth", "seconds", "MiB moved", "peak GiB", "stall s"), growth_rows(findings)),
    )
    for heading, rows in tables:
        lines += table(heading, list(rows))
    return lines + problems(findings)


def table(heading: Row, rows: Sequence[Row]) -> list[str]:
    """Aligned columns under a heading, an empty line before; nothing without rows."""
    if not rows:
        return []
    columns = list(zip(heading, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heading, *rows)
    ]
    return ["", aligned[0], "-" * len(aligned[0]), *aligned[1:]]


def part_rows(outcomes: Iterable[Outcome], findings: Findings) -> Iterator[Row]:
    """How each part ended; the tests with their counts, the others with their ceilings."""
    for outcome in outcomes:
        words = [outcome.result]
        for tests in findings.of("tests", part=outcome.name):
            counts = (tests["passed"], len(tests["failed"]), tests["skipped"])
            words.append("{} passed, {} failed, {} skipped".format(*counts))
        if findings.of("ceiling", part=outcome.name):
            rates = (findings.ceiling(name, outcome.name) / 1e12 for name in ("matmul", "copy"))
            words.append("matmul {:.0f} TFLOP/s, copy {:.2f} TB/s".format(*rates))
        yield outcome.name, f"{outcome.seconds:.0f}", "; ".join(words)


def kernel_rows(findings: Findings) -> Iterator[Row]:
    """megagrow's kernels, each with its rate and all the others' seconds over its own."""
    for ours in findings.timings(by=OURS):
        bound, unit = ("flops", "TFLOP/s") if ours["flops"] else ("bytes", "TB/s")
        rate = ours[bound] / ours["seconds"]
        ceiling = findings.ceiling("matmul" if ours["flops"] else "copy", ours["part"])
        same = {key: ours[key] for key in ("op", "case", "way")}
        ratios = [
            f"{other['by']} {other['seconds'] / ours['seconds']:.2f}"
            for other in findings.timings(**same)
            if other["by"] != OURS
        ]
        yield (
            f"{ours['op']} {ours['way']}, {ours['case']}",
            f"{1e6 * ours['seconds']:.1f}",
            f"{rate / 1e12:.{0 if ours['flops'] else 2}f} {unit}",
            f"{rate / ceiling:.0%}",
            ", ".join(ratios),
        )


def memory_rows(findings: Findings) -> Iterator[Row]:
    """What the head and the loss take."""
    for record in findings.of("memory"):
        if "extra_bytes" in record:
            share = record["extra_bytes"] / record["logits_bytes"]
            extra = f"{record['extra_bytes'] / 2**20:.0f}"
            yield record["case"], record["by"], extra, f"{share:.3f}"


def training_rows(findings: Findings) -> Iterator[Row]:
    """What a step of each model takes, by each set of kernels."""
    for record in findings.of("training"):
        if "seconds" in record:
            yield (
                record["model"],
                record["backend"],
                f"{record['tokens_per_second']:.0f}",
                _shown(record["mfu"], "{:.3f}"),
                _shown(record["memory_bytes"], "{:.1f}", 2**30),
                f"{record['first_seconds']:.1f}",
            )


def growth_rows(findings: Findings) -> Iterator[Row]:
    """What each growth takes."""
    for record in findings.of("growth"):
        yield (
            record["case"],
            f"{record['seconds']:.2f}",
            _shown(record["bytes_within_ranks"], "{:.0f}", 2**20),
            _shown(record["peak_memory_bytes"], "{:.1f}", 2**30),
            f"{record['stall_seconds']:.2f}",
        )


def problems(findings: Findings) -> list[str]:
    """What could not be done, a line each: failed tests, contenders that cannot, libraries that
    are not installed."""
    lines = [f"failed test: {n}" for tests in findings.of("tests") for n in tests["failed"]]
    for record in findings.records:
        if "problem" in record:
            names = ("op", "way", "case", "model", "by", "backend")
            what = " ".join(str(record[name]) for name in names if name in record)
            lines.append(f"{what}: {record['problem'][:200]}")
    absent = sorted({record["library"] for record in findings.of("missing")})
    lines += [f"not installed, so not compared with: {', '.join(absent)}"] if absent else []
    return ["", *lines] if lines else []


def _shown(value: Any, form: str, unit: float = 1.0) -> str:
    return NOT_MEASURED if value is None else form.format(value / unit)


def failures(findings: Findings) -> list[Record]:
    """The problems that are megagrow's own. That a model does not fit into a card is none."""
    own = [
        record
        for record in findings.records
        if record.get("by", OURS) == OURS
        and not record.get("problem", "OutOfMemoryError").startswith("OutOfMemoryError")
    ]
    return own + [r for r in findings.of("tests") if r["failed"]]
