"""Benchmark configuration of `megagrow.run.train`, and a breakdown of its step time.

The run is that of `megagrow train`: data, metrics of each step (also TensorBoard), stability
guards, watchdog, DeepSpeed.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tools.benchmarks.training.gate import Boundary, TrainingCase
from tools.benchmarks.training.loops import BETAS, CLIP, DECAY, LR


def train_own(case: TrainingCase, boundary: Boundary) -> None:
    """Train all steps of a case; `boundary` precedes each iteration of the training loop."""
    from megagrow import run
    from megagrow.config.load import load_run

    path = Path(case.folder, "run.yaml")
    if not path.exists():
        path.write_text(json.dumps(run_values(case)), encoding="utf-8")  # JSON is YAML
    advance: Callable[..., Any] = run.advance

    def gated(*arguments: Any) -> Any:
        boundary()
        return advance(*arguments)

    run.advance = gated
    run.train(load_run(path))


def run_values(case: TrainingCase) -> dict[str, Any]:
    """Return the contents of the run file."""
    return {
        "name": case.configuration,
        "output_dir": str(Path(case.folder, "run")),
        "precision": "fp32",
        "model": case.model,
        "tokens": case.steps * case.batch * case.sequence,
        "data": {"train": [{"path": case.corpus}], "sequence_length": case.sequence},
        "parallel": {"zero_stage": case.zero_stage},
        "batch": {"global_batch_size": case.batch, "micro_batch_size": case.micro},
        "optimizer": {
            "lr": LR,
            "betas": BETAS,
            "weight_decay": DECAY,
            "gradient_clipping": CLIP,
        },
        "checkpoint": {"interval": 10**9},
    }


class PartTimer:
    """Seconds of the parts of a step, measured by wrapping functions.

    The time of a nested part is subtracted from the enclosing part, so that the parts add up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._within: list[float] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Add the time of all further calls of owner.name to a part."""
        original = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            self._within.append(0.0)
            try:
                return original(*arguments, **options)
            finally:
                spent = time.perf_counter() - begin
                self.seconds[part] += spent - self._within.pop()
                if self._within:
                    self._within[-1] += spent

        setattr(owner, name, timed)

    def read(self) -> dict[str, float]:
        """Return the seconds per part since the last call."""
        parts, self.seconds = dict(self.seconds), defaultdict(float)
        return parts


def time_parts(timer: PartTimer) -> None:
    """Wrap the parts of a step of a run; to be called before the run starts."""
    from megagrow.parallel.engine import ZeroEngine
    from megagrow.train import loop
    from megagrow.train.reporting.run_logger import RunLogger
    from megagrow.train.step_feed import StepFeed

    timer.wrap(StepFeed, "read", "waiting for batches")
    timer.wrap(ZeroEngine, "forward", "forward")
    timer.wrap(ZeroEngine, "backward", "backward")
    timer.wrap(ZeroEngine, "step", "DeepSpeed step without AdamW")
    timer.wrap(torch.optim.AdamW, "step", "AdamW")
    timer.wrap(dist, "all_reduce", "all-reduce")
    timer.wrap(RunLogger, "step", "metrics")
    timer.wrap(loop, "train_at", "rest of the step: loss, learning rate, masks")
    timer.wrap(loop, "_measured_step", "step metrics, memory, counters")
