"""Throughputs that others published, and what the model of a step gives for the same runs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from megagrow.planning.cluster import Cluster, ClusterFile, make_cluster
from megagrow.planning.step_time import StepTime, step_time
from megagrow.planning.step_workload import Shape, StepWorkload

RowUse = Literal["set", "held out", "fresh"]
"""A row that constants were set from; one that no constant was set from, but which was looked at
before they were fixed; one whose prediction was looked at only afterwards."""

ROWS = Path(__file__).with_name("published_throughputs.json")


@dataclass(frozen=True)
class Published:
    """One published row."""

    source: str
    address: str
    model: str
    work: StepWorkload
    cluster: Cluster
    tokens_per_gpu: float
    """Per second, as published."""
    role: RowUse

    @property
    def predicted(self) -> StepTime:
        return step_time(self.work, self.cluster)

    @property
    def error(self) -> float:
        """Predicted tokens per second over published ones, - 1."""
        return self.predicted.tokens_per_gpu / self.tokens_per_gpu - 1


@cache
def published_rows() -> tuple[Published, ...]:
    """All rows that were tried, in the order of their sources."""
    data = json.loads(ROWS.read_text(encoding="utf-8"))
    return tuple(row for source in data["sources"] for row in _rows(source, data["models"]))


def published_sources() -> list[dict[str, Any]]:
    """Name, address and note of each source."""
    data = json.loads(ROWS.read_text(encoding="utf-8"))
    return [{key: each[key] for key in ("name", "address", "note")} for each in data["sources"]]


def _rows(source: dict[str, Any], models: dict[str, Any]) -> Iterator[Published]:
    figures = {key: source[key] for key in ClusterFile.model_fields if key in source}
    for row in source["rows"]:
        work = StepWorkload(
            shape=Shape(**models[row["model"]], sequence=row["sequence"]),
            dp=row["gpus"] // row["tp"],
            tp=row["tp"],
            zero_stage=row["zero_stage"],
            micro_batch=row["micro_batch"],
            accumulation=row["accumulation"],
            recomputed=row["recomputed"],
            sequence_parallel=row["tp"] > 1,
            attention=source["attention"],
            stack=source["stack"],
            gradient_bytes=row.get("gradient_bytes", source["gradient_bytes"]),
        )
        nodes = max(1, row["gpus"] // figures["gpus_per_node"])
        size = {"nodes": nodes}
        cluster = make_cluster(source["name"], ClusterFile(**{**figures, **size}))
        yield Published(
            source=source["name"],
            address=source["address"],
            model=row["model"],
            work=work,
            cluster=cluster,
            tokens_per_gpu=row["tokens_per_gpu"],
            role=row["role"],
        )
