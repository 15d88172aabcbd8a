"""What was found, and whether it is what the kernels were to reach. Pure: records in, rows out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tools.gpu.bench.case import OURS, Record

NOT_MEASURED = "not measured"


class Findings:
    """The records of all parts of a check, and questions to them.

    A question about several cases is answered by the worst of them, one that was not measured by
    None.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)

    def of(self, kind: str, **wanted: Any) -> list[Record]:
        """The records of a kind that have these values."""
        return [
            record
            for record in self.records
            if record["kind"] == kind and all(record.get(k) == v for k, v in wanted.items())
        ]

    def ceiling(self, name: str, part: str) -> float:
        """The best rate of `copy` (bytes/s) or `matmul` (FLOP/s) in the process of a part."""
        return max(record[name] for record in self.of("ceiling", part=part))

    def timings(self, **wanted: Any) -> list[Record]:
        """What took how long; what could not be measured is left out."""
        return [record for record in self.of("timing", **wanted) if "seconds" in record]

    def ours(self, **wanted: Any) -> list[Record]:
        """megagrow's timings; none if one of these cases failed, since it would be the worst."""
        found = self.of("timing", by=OURS, **wanted)
        return found if all("seconds" in record for record in found) else []

    def share_of_copy(self, **wanted: Any) -> float | None:
        """Our bytes/s as a share of the copy's."""
        shares = [
            record["bytes"] / record["seconds"] / self.ceiling("copy", record["part"])
            for record in self.ours(**wanted)
        ]
        return min(shares, default=None)

    def ahead(self, other: str, least: int = 0, **wanted: Any) -> float | None:
        """Seconds of another over ours, in the cases that both did; of sequences from `least`."""
        ratios = []
        for ours in self.ours(**wanted):
            same = {key: ours[key] for key in ("op", "case", "way")}
            long = ours.get("sequence", least) >= least
            ratios += [
                r["seconds"] / ours["seconds"] for r in self.timings(by=other, **same) if long
            ]
        return min(ratios, default=None)

    def packed_rate(self, way: str) -> float | None:
        """Our useful FLOP/s on packed documents over those on dense rows as long as a document."""
        wanted = {"op": "attention", "way": way, "head_dim": 128}
        packed = self.ours(shape="packed", **wanted) + self.ours(shape="skewed", **wanted)
        dense = self.ours(shape="dense", sequence=2048, **wanted)
        rates = [[r["flops"] / r["seconds"] for r in group] for group in (packed, dense)]
        return min(rates[0]) / max(rates[1]) if all(rates) else None

    def over_floor(self, op: str) -> float | None:
        """Our seconds over those that the bytes take at the copy's rate."""
        share = self.share_of_copy(op=op, way="both")
        return None if share is None else 1 / share

    def chunked_memory(self) -> float | None:
        """Extra memory of linear + cross-entropy over the bytes of the logits."""
        ours = self.of("memory", by=OURS)
        return max((r["extra_bytes"] / r["logits_bytes"] for r in ours), default=None)

    def utilisation(self, model: str) -> float | None:
        """The best model FLOPs utilisation that a model was trained at."""
        found = [record.get("mfu") for record in self.of("training", model=model)]
        return max((mfu for mfu in found if mfu is not None), default=None)


@dataclass(frozen=True)
class Goal:
    """A number to be reached."""

    text: str
    bound: float
    ask: Callable[[Findings], float | None]
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether this value is good enough."""
        return value <= self.bound if self.at_most else value >= self.bound


def _norm(op: str, text: str) -> Iterator[Goal]:
    for way, share in (("forward", 0.93), ("backward", 0.85)):
        what = {"op": op, "way": way}
        yield Goal(f"{text} {way}, of copy", share, partial(Findings.share_of_copy, **what))
        for other, name in (("compile", "torch.compile"), ("liger", "Liger")):
            ask = partial(Findings.ahead, other=other, **what)
            yield Goal(f"{text} {way}, speed over {name}", 1.0, ask)


def _attention() -> Iterator[Goal]:
    dense = {"op": "attention", "shape": "dense", "head_dim": 128}
    for way, share in (("forward", 0.85), ("backward", 0.80)):
        for other, bound in (("cudnn", share), ("flash", 1.3)):
            ask = partial(Findings.ahead, other=other, least=4096, way=way, **dense)
            yield Goal(f"attention d128 from 4k {way}, speed over SDPA {other}", bound, ask)
    for way in ("forward", "backward"):
        ask = partial(Findings.packed_rate, way=way)
        yield Goal(f"packed documents {way}, of our dense FLOP/s", 0.95, ask)


def _loss() -> Iterator[Goal]:
    over_floor = partial(Findings.over_floor, op="cross_entropy")
    yield Goal("vocab-parallel cross-entropy, over its byte floor", 1.25, over_floor, at_most=True)
    ahead = partial(Findings.ahead, other="plain", op="linear_cross_entropy")
    yield Goal("linear + cross-entropy, speed over plain", 1.0, ahead)
    memory = Findings.chunked_memory
    yield Goal("linear + cross-entropy, memory over the logits'", 0.125, memory, at_most=True)


GOALS: Sequence[Goal] = (
    *_norm("rms_norm", "RMSNorm"),
    *_norm("add_rms_norm", "RMSNorm with addition"),
    *_attention(),
    *_loss(),
    Goal("1.1B training, MFU", 0.5, partial(Findings.utilisation, model="llama-1.1b")),
)


def goal_rows(findings: Findings) -> list[tuple[str, str, str, str]]:
    """Goal, its bound, what was measured, and whether it is met."""
    rows = []
    for goal in GOALS:
        value = goal.ask(findings)
        bound = f"{'<=' if goal.at_most else '>='} {goal.bound:g}"
        if value is None:
            rows.append((goal.text, bound, NOT_MEASURED, ""))
        else:
            rows.append((goal.text, bound, f"{value:.3f}", "met" if goal.met(value) else "not met"))
    return rows
