"""The results of run.py as numbers and as tables."""

import statistics
from typing import Any

from megagrow.common.tables import markdown_table
from tools.benchmarks.training.turns import Contestant

OURS = "ours"


def summary(contestant: Contestant) -> dict[str, Any]:
    """What a contestant's turns come to; the first turn is left out, in which memory is new."""
    case = contestant.case
    turns = contestant.turns[1:]
    tokens = case.batch * case.sequence
    measured = [_parts(turn) for turn in turns]
    parts = {
        name: statistics.median(one.get(name, 0.0) for one in measured)
        for name in set().union(*measured)
    }
    return {
        "contestant": case.contestant,
        "ranks": case.ranks,
        "threads": case.threads,
        "start_seconds": contestant.start_seconds,
        "wall": [turn["wall"] / turn["steps"] / tokens for turn in turns],
        "cpu": [turn["cpu"] / turn["steps"] / tokens for turn in turns],
        "step_seconds": statistics.median(turn["wall"] / turn["steps"] for turn in turns),
        "parts": dict(sorted(parts.items(), key=lambda part: -part[1])),
    }


def _parts(turn: dict[str, Any]) -> dict[str, float]:
    """Seconds of the parts of a step in one turn; none where they are not measured."""
    parts = {name: seconds / turn["steps"] for name, seconds in (turn["parts"] or {}).items()}
    rest = turn["wall"] / turn["steps"] - sum(parts.values())
    return parts | {"between the steps": rest} if parts else {}


def ratio(results: list[dict[str, Any]], one: str, other: str, clock: str) -> float:
    """How many times as fast `one` is as `other`: the median of the rounds' ratios, by `clock`
    (`wall` or `cpu`), each a list of seconds per token."""
    by_name = {row["contestant"]: row for row in results}
    pairs = zip(by_name[one][clock], by_name[other][clock], strict=True)
    return statistics.median(theirs / own for own, theirs in pairs)


def markdown(results: dict[str, Any]) -> str:
    """All results as tables."""
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
    """Ours against each contestant of as many ranks."""
    columns = (
        *("contestant", "ranks", "tokens/s", "ours is faster by, wall"),
        *("ours is faster by, CPU time", "first step after s"),
    )
    table: list[tuple[str, ...]] = []
    names = {row["contestant"] for row in rows}
    for row in rows:
        own = OURS if row["ranks"] == 1 else f"{OURS}: {row['ranks']} ranks"
        name = row["contestant"]
        ratios = ["-", "-"]
        if own in names:
            ratios = [f"{ratio(rows, own, name, clock):.3f}" for clock in ("wall", "cpu")]
        throughput = f"{1 / statistics.median(row['wall']):,.0f}"
        table.append((name, str(row["ranks"]), throughput, *ratios, f"{row['start_seconds']:.1f}"))
    return [markdown_table(columns, table)]


def _parts_table(row: dict[str, Any]) -> list[str]:
    step = sum(row["parts"].values())
    columns = (f"part of a step of {row['contestant']!r}, median", "ms", "share")
    table = [
        (name, f"{1000 * seconds:.2f}", f"{100 * seconds / step:.2f}%")
        for name, seconds in row["parts"].items()
    ]
    return [markdown_table(columns, [*table, ("together", f"{1000 * step:.1f}", "100%")])]


def _prepare_table(found: dict[str, Any]) -> list[str]:
    if "ways" not in found:
        return [f"prepare: not installed: {', '.join(found['not_installed'])}"]
    heading = f"{found['bytes'] / 1e6:.1f} MB of JSON lines on {found['cores']} cores:"
    columns = ("tokenizer", "way", "MB/s", "tokens", "prepare is faster by, wall", "by, CPU time")
    table = []
    own = {row["tokenizer"]: row for row in found["ways"] if "prepare" in row["way"]}
    for row in found["ways"]:
        ours = own[row["tokenizer"]]
        table.append(
            (
                *(row["tokenizer"], row["way"], f"{found['bytes'] / 1e6 / row['seconds']:.2f}"),
                *(f"{row['tokens']:,}", f"{row['seconds'] / ours['seconds']:.2f}"),
                f"{row['cpu_seconds'] / ours['cpu_seconds']:.2f}",
            )
        )
    return [heading, "", markdown_table(columns, table)]
