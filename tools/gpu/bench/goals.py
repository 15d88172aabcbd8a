"""Performance goals, evaluated on benchmark records. Pure functions: records in, rows out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tools.gpu.bench.case import OURS, Record

NOT_MEASURED = "not measured"


class BenchmarkResults:
    """Queries over the records of all parts of a check.

    A query over several cases returns the worst of them, or None if one was not measured.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)

    def of(self, kind: str, **filters: Any) -> list[Record]:
        """Return the records of a kind with these values."""
        return [
            record
            for record in self.records
            if record["kind"] == kind and all(record.get(k) == v for k, v in filters.items())
        ]

    def ceiling(self, name: str, part: str) -> float:
        """Return the best rate of `copy` (bytes/s) or `matmul` (FLOP/s) in a part's process."""
        return max(record[name] for record in self.of("ceiling", part=part))

    def timings(self, **filters: Any) -> list[Record]:
        """Return the timing records with these values, without failed measurements."""
        return [record for record in self.of("timing", **filters) if "seconds" in record]

    def ours(self, **filters: Any) -> list[Record]:
        """Return megagrow's timings; an empty list if one of these cases failed."""
        timings = self.of("timing", by=OURS, **filters)
        return timings if all("seconds" in record for record in timings) else []

    def copy_fraction(self, **filters: Any) -> float | None:
        """Return megagrow's bytes/s as a fraction of the copy rate."""
        shares = [
            record["bytes"] / record["seconds"] / self.ceiling("copy", record["part"])
            for record in self.ours(**filters)
        ]
        return min(shares, default=None)

    def speedup(self, baseline: str, min_sequence: int = 0, **filters: Any) -> float | None:
        """Return a baseline's seconds over megagrow's, in cases measured for both.

        `min_sequence` excludes cases with shorter sequences.
        """
        ratios = []
        for ours in self.ours(**filters):
            same = {key: ours[key] for key in ("op", "case", "way")}
            long = ours.get("sequence", min_sequence) >= min_sequence
            ratios += [
                r["seconds"] / ours["seconds"] for r in self.timings(by=baseline, **same) if long
            ]
        return min(ratios, default=None)

    def packed_rate(self, way: str) -> float | None:
        """Return FLOP/s on packed documents over that on dense rows of the same length."""
        filters = {"op": "attention", "way": way, "head_dim": 128}
        packed = self.ours(shape="packed", **filters) + self.ours(shape="skewed", **filters)
        dense = self.ours(shape="dense", sequence=2048, **filters)
        rates = [[r["flops"] / r["seconds"] for r in group] for group in (packed, dense)]
        return min(rates[0]) / max(rates[1]) if all(rates) else None

    def floor_ratio(self, op: str) -> float | None:
        """Return megagrow's seconds over the time of its bytes at the copy rate."""
        share = self.copy_fraction(op=op, way="both")
        return None if share is None else 1 / share

    def chunked_memory(self) -> float | None:
        """Return the extra memory of linear + cross-entropy over the bytes of the logits."""
        ours = self.of("memory", by=OURS)
        return max((r["extra_bytes"] / r["logits_bytes"] for r in ours), default=None)

    def utilization(self, model: str) -> float | None:
        """Return the highest model FLOPs utilization of a model's training runs."""
        values = [record.get("mfu") for record in self.of("training", model=model)]
        return max((mfu for mfu in values if mfu is not None), default=None)


@dataclass(frozen=True)
class PerformanceGoal:
    """A performance target."""

    name: str
    bound: float
    query: Callable[[BenchmarkResults], float | None]
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Return True if a value meets the goal."""
        return value <= self.bound if self.at_most else value >= self.bound


def _norm(op: str, text: str) -> Iterator[PerformanceGoal]:
    for way, share in (("forward", 0.93), ("backward", 0.85)):
        filters = {"op": op, "way": way}
        yield PerformanceGoal(
            f"{text} {way}, of copy", share, partial(BenchmarkResults.copy_fraction, **filters)
        )
        for other, name in (("compile", "torch.compile"), ("liger", "Liger")):
            query = partial(BenchmarkResults.speedup, baseline=other, **filters)
            yield PerformanceGoal(f"{text} {way}, speed over {name}", 1.0, query)


def _attention() -> Iterator[PerformanceGoal]:
    dense = {"op": "attention", "shape": "dense", "head_dim": 128}
    for way, share in (("forward", 0.85), ("backward", 0.80)):
        for other, bound in (("cudnn", share), ("flash", 1.3)):
            query = partial(
                BenchmarkResults.speedup, baseline=other, min_sequence=4096, way=way, **dense
            )
            yield PerformanceGoal(
                f"attention d128 from 4k {way}, speed over SDPA {other}", bound, query
            )
    for way in ("forward", "backward"):
        query = partial(BenchmarkResults.packed_rate, way=way)
        yield PerformanceGoal(f"packed documents {way}, of our dense FLOP/s", 0.95, query)


def _loss() -> Iterator[PerformanceGoal]:
    floor_ratio = partial(BenchmarkResults.floor_ratio, op="cross_entropy")
    yield PerformanceGoal(
        "vocab-parallel cross-entropy, over its byte floor", 1.25, floor_ratio, at_most=True
    )
    speedup = partial(BenchmarkResults.speedup, baseline="plain", op="linear_cross_entropy")
    yield PerformanceGoal("linear + cross-entropy, speed over plain", 1.0, speedup)
    memory = BenchmarkResults.chunked_memory
    yield PerformanceGoal(
        "linear + cross-entropy, memory over the logits'", 0.125, memory, at_most=True
    )


GOALS: Sequence[PerformanceGoal] = (
    *_norm("rms_norm", "RMSNorm"),
    *_norm("add_rms_norm", "RMSNorm with addition"),
    *_attention(),
    *_loss(),
    PerformanceGoal(
        "1.1B training, MFU", 0.5, partial(BenchmarkResults.utilization, model="llama-1.1b")
    ),
)


def goal_rows(results: BenchmarkResults) -> list[tuple[str, str, str, str]]:
    """Return each goal with its bound, the measured value and the verdict."""
    rows = []
    for goal in GOALS:
        value = goal.query(results)
        bound = f"{'<=' if goal.at_most else '>='} {goal.bound:g}"
        if value is None:
            rows.append((goal.name, bound, NOT_MEASURED, ""))
        else:
            rows.append((goal.name, bound, f"{value:.3f}", "met" if goal.met(value) else "not met"))
    return rows
