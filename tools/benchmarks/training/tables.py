"""Summaries and Markdown tables of the results of run.py."""

import statistics
from typing import Any

from megagrow.common.tables import markdown_table
from tools.benchmarks.training.prepare import ENCODER
from tools.benchmarks.training.turns import Configuration

OURS = "ours"


def summary(configuration: Configuration) -> dict[str, Any]:
    """Return the times of a configuration without the first turn, which allocates memory."""
    case = configuration.case
    turns = configuration.turns[1:]
    tokens = case.batch * case.sequence
    measured = [_parts(turn) for turn in turns]
    parts = {
        name: statistics.median(one.get(name, 0.0) for one in measured)
        for name in set().union(*measured)
    }
    return {
        "configuration": case.configuration,
        "ranks": case.ranks,
        "threads": case.threads,
        "start_seconds": configuration.start_seconds,
        "wall": [turn["wall"] / turn["steps"] / tokens for turn in turns],
        "cpu": [turn["cpu"] / turn["steps"] / tokens for turn in turns],
        "step_seconds": statistics.median(turn["wall"] / turn["steps"] for turn in turns),
        "parts": dict(sorted(parts.items(), key=lambda part: -part[1])),
    }


def _parts(turn: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of each part of a step in one turn, or {} if not measured."""
    parts = {name: seconds / turn["steps"] for name, seconds in (turn["parts"] or {}).items()}
    rest = turn["wall"] / turn["steps"] - sum(parts.values())
    return parts | {"between steps": rest} if parts else {}


def ratio(results: list[dict[str, Any]], one: str, other: str, clock: str) -> float:
    """Return the speedup of `one` over `other`: the median ratio over the rounds.

    `clock` is `wall` or `cpu`, a list of seconds per token for each round.
    """
    by_name = {row["configuration"]: row for row in results}
    pairs = zip(by_name[one][clock], by_name[other][clock], strict=True)
    return statistics.median(theirs / own for own, theirs in pairs)


def markdown(results: dict[str, Any]) -> str:
    """Return all results as Markdown tables."""
    lines = _training_table(results.get("training", []))
    lines += [f"Not installed: {name}" for name in results.get("not_installed", [])]
    for row in results.get("training", []):
        if row["parts"]:
            lines += ["", *_parts_table(row)]
    if "prepare" in results:
        lines += ["", *_prepare_table(results["prepare"])]
    lines += ["", f"The benchmark took {results['seconds']:.0f} s."]
    return "\n".join(lines) + "\n"


def _training_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the speedups of ours over the configurations with the same number of ranks."""
    columns = (
        *("configuration", "ranks", "tokens/s", "speedup of ours, wall"),
        *("speedup of ours, CPU time", "time to first step, s"),
    )
    table: list[tuple[str, ...]] = []
    names = {row["configuration"] for row in rows}
    for row in rows:
        own = OURS if row["ranks"] == 1 else f"{OURS}: {row['ranks']} ranks"
        name = row["configuration"]
        ratios = ["-", "-"]
        if own in names:
            ratios = [f"{ratio(rows, own, name, clock):.3f}" for clock in ("wall", "cpu")]
        throughput = f"{1 / statistics.median(row['wall']):,.0f}"
        table.append((name, str(row["ranks"]), throughput, *ratios, f"{row['start_seconds']:.1f}"))
    return [markdown_table(columns, table)]


def _parts_table(row: dict[str, Any]) -> list[str]:
    step = sum(row["parts"].values())
    columns = (f"part of a step, median of *{row['configuration']}*", "ms", "share")
    table = [
        (name, f"{1000 * seconds:.2f}", f"{100 * seconds / step:.2f}%")
        for name, seconds in row["parts"].items()
    ]
    return [markdown_table(columns, [*table, ("total", f"{1000 * step:.1f}", "100%")])]


def _prepare_table(results: dict[str, Any]) -> list[str]:
    if "methods" not in results:
        return [f"prepare: not installed: {', '.join(results['not_installed'])}"]
    size = results["bytes"] / 1e6
    heading = f"{size:.1f} MB of JSON lines on {results['cores']} cores:"
    columns = ("tokenizer", "method", "MB/s", "tokens", "speedup of prepare, wall", "CPU time")
    columns += ("encoder's share of CPU time",)
    table = []
    by_name = {(row["tokenizer"], row["method"]): row for row in results["methods"]}
    for row in results["methods"]:
        ours = by_name[row["tokenizer"], "megagrow prepare"]
        encoder = by_name[row["tokenizer"], ENCODER]
        table.append(
            (
                *(row["tokenizer"], row["method"], f"{size / row['seconds']:.2f}"),
                *(f"{row['tokens']:,}", f"{row['seconds'] / ours['seconds']:.2f}"),
                f"{row['cpu_seconds'] / ours['cpu_seconds']:.2f}",
                f"{100 * encoder['cpu_seconds'] / row['cpu_seconds']:.0f}%",
            )
        )
    return [heading, "", markdown_table(columns, table)]
