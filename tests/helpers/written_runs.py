"""Runs that were never trained: their losses are a power law of the FLOPs, with some noise."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from megagrow.config.load import load_run, to_yaml
from megagrow.train.reporting.metrics import Counters, MetricsLog, StepMetrics, train_fields

TOKENS = 1000
EVERY = 10


class Stage(NamedTuple):
    """Steps of a model of so many parameters; the loss is floor + height (FLOPs + ahead)^-0.3."""

    steps: int
    parameters: int
    ahead: float = 0.0
    floor: float = 1.5


def loss_at(flops: float, stage: Stage) -> float:
    return stage.floor + 6.0 * ((flops + stage.ahead) / 1e9) ** -0.3


def write_run(
    directory: Path, stages: list[Stage], *, noise: float = 0.0, end: bool = True
) -> Path:
    """A run's directory, written as training writes it: validation every 10 steps."""
    draw, counters = random.Random(directory.name), Counters()
    with MetricsLog(directory) as log:
        total = sum(stage.steps for stage in stages)
        sizes = [stage.parameters for stage in stages]
        named = {"name": directory.name, "seed": 1, "parameters": sizes}
        log.write("start", counters, **named, run_steps=total, run_tokens=total * TOKENS)
        for index, stage in enumerate(stages):
            if index:
                counters = counters.add_lost_time(2.0)
                log.write("growth", counters, stage=index)
            for _ in range(stage.steps):
                flops = 6.0 * stage.parameters * TOKENS
                loss = loss_at(counters.flops + flops, stage)
                seen = StepMetrics(
                    stage=index, loss=loss + noise * draw.gauss(0, 1), lr=1e-3, grad_norm=1.0,
                    tokens=TOKENS, flops=flops, flops_true=flops, seconds=0.5, memory_bytes=1,
                    position=counters.tokens,
                )  # fmt: skip
                counters = counters.after_step(seen)
                log.write("train", counters, **train_fields(seen, None))
                if counters.step % EVERY == 0:
                    log.write("validation", counters, stage=index, loss=loss)
        if end:
            log.write("end", counters)
    return directory


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """write_run, into a new directory of the given name; a stage is a tuple of Stage's fields."""
    return lambda name, stages, **how: write_run(
        tmp_path / name, [Stage(*stage) for stage in stages], **how
    )


@pytest.fixture
def grown_run(tmp_path: Path) -> Callable[..., Path]:
    """A run's directory with its configuration: the demo's model with so many layers before and
    after the growth, which comes after so many steps of 600. The loss is higher by half a nat per
    squared decade of `off`, a ratio to what would have been best."""
    demo = load_run(Path(__file__).parents[2] / "configs" / "demo" / "gstack.yaml")

    def write(name: str, layers: tuple[int, int], base_steps: int, off: float) -> Path:
        floor = 1.5 + 0.5 * math.log10(off) ** 2
        sizes = [1000 * count for count in layers]
        stages = [Stage(base_steps, sizes[0]), Stage(600 - base_steps, sizes[1], floor=floor)]
        directory = write_run(tmp_path / name, stages)
        parts = [
            stage.model_copy(
                update={"model": stage.model.model_copy(update={"num_hidden_layers": count})}
            )
            for stage, count in zip(demo.stages, layers, strict=True)
        ]
        run = demo.model_copy(update={"stages": parts})
        (directory / "config.yaml").write_text(to_yaml(run), encoding="utf-8")
        return directory

    return write
