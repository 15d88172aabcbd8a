"""Published throughputs and the step model's predictions for the same runs."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from megagrow.config.schema import ModelConfig, ParallelConfig
from megagrow.model.layers.attention import ATTENTION
from megagrow.model.layers.costs import RowElements
from megagrow.model.layers.mlp import FFN, MLP
from megagrow.parallel.pipeline.split import PipelineSplit, pipeline_split
from megagrow.planning.cluster import Cluster, ClusterFile, make_cluster
from megagrow.planning.step.timing import StepTime, step_time
from megagrow.planning.step.workload import Shape, StepWorkload, shape_of

RowUse = Literal["set", "held out", "fresh"]
"""`set`: constants were set from the row; `held out`: not used for constants, but seen before they
were fixed; `fresh`: predicted only afterwards."""

ROWS = Path(__file__).with_name("published_throughputs.json")


@dataclass(frozen=True)
class Published:
    """Published throughput of one run."""

    source: str
    address: str
    model: str
    work: StepWorkload
    cluster: Cluster
    tokens_per_gpu: float
    """Published tokens per second and GPU."""
    role: RowUse

    @property
    def predicted(self) -> StepTime:
        return step_time(self.work, self.cluster)

    @property
    def error(self) -> float:
        """Predicted over published tokens per second, - 1."""
        return self.predicted.tokens_per_gpu / self.tokens_per_gpu - 1


@cache
def published_rows() -> tuple[Published, ...]:
    """Return all rows in the order of their sources."""
    data = json.loads(ROWS.read_text(encoding="utf-8"))
    return tuple(row for source in data["sources"] for row in _rows(source, data["models"]))


def published_sources() -> list[dict[str, Any]]:
    """Return name, address and note of each source."""
    data = json.loads(ROWS.read_text(encoding="utf-8"))
    return [{key: each[key] for key in ("name", "address", "note")} for each in data["sources"]]


def _ungated_rows(config: ModelConfig) -> RowElements:
    width = FFN.size(config)
    return RowElements(2 * width, 3 * width, 2 * width)


_UNGATED_MLP = replace(
    MLP, parameters=lambda config: MLP.parameters(config)[1:], row_elements=_ungated_rows
)
"""Feed-forward with GELU: no gate_proj."""


def _shape(sizes: Mapping[str, Any], sequence: int) -> Shape:
    """Return the shape of a model in the file: keys of the model section, and `gated`."""
    fields = dict(sizes)
    gated = fields.pop("gated", True)
    shape = shape_of(ModelConfig(**fields), sequence)
    if gated:
        return shape
    layers = shape.model.num_hidden_layers
    return replace(shape, blocks=Counter({ATTENTION: layers, _UNGATED_MLP: layers}))


def _split(model: ModelConfig, ranks: int, chunks_per_rank: int) -> PipelineSplit:
    """Return the layers of each pipeline rank."""
    parallel = ParallelConfig(
        pipeline_model_parallel_size=ranks, virtual_pipeline_model_parallel_size=chunks_per_rank
    )
    return pipeline_split(model, parallel)


def _rows(source: dict[str, Any], models: dict[str, Any]) -> Iterator[Published]:
    figures = {key: source[key] for key in ClusterFile.model_fields if key in source}
    for row in source["rows"]:
        shape, pp = _shape(models[row["model"]], row["sequence"]), row.get("pp", 1)
        work = StepWorkload(
            shape=shape,
            dp=row["gpus"] // (row["tp"] * pp),
            tp=row["tp"],
            zero_stage=row["zero_stage"],
            micro_batch=row["micro_batch"],
            accumulation=row["accumulation"],
            recomputed=row["recomputed"],
            sequence_parallel=row.get("sequence_parallel", row["tp"] > 1),
            overlap_grad_reduce=row.get("overlap_grad_reduce", True),
            attention=source["attention"],
            stack=source["stack"],
            gradient_bytes=row.get("gradient_bytes", source["gradient_bytes"]),
            split=_split(shape.model, pp, row.get("v", 1)) if pp > 1 else None,
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
