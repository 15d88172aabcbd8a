"""Metrics records of invented steps."""

from typing import Any

from megagrow.train.reporting.metrics import Counters, MetricsLog, StepMetrics, train_fields


def measure(step: int, stage: int = 0, **changes: Any) -> StepMetrics:
    """Measurements of a step."""
    fields = {
        "stage": stage,
        "loss": 5.0 - step / 7,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "tokens": 64,
        "flops": 6.4e3,
        "flops_true": 8e3,
        "seconds": 0.5,
        "memory_bytes": 1 << 20,
        "position": 64 * step,
    }
    return StepMetrics(**{**fields, **changes})


def train(log: MetricsLog, counters: Counters, until: int, stage: int = 0) -> Counters:
    """Steps up to `until`, a validation after every third."""
    while counters.step < until:
        seen = measure(counters.step, stage)
        counters = counters.after_step(seen)
        log.write("train", counters, **train_fields(seen, None))
        if counters.step % 3 == 0:
            log.write("validation", counters, stage=stage, loss=4.0 - counters.step / 9)
    return counters
