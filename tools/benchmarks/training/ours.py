"""Megagrow's own run, `megagrow.run.train`, with a gate between its steps; and where its time goes.

The run is the one that `megagrow train` makes of a file: data, metrics of each step (TensorBoard
too), guards, watchdog, DeepSpeed.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tools.benchmarks.training.gate import Boundary, Case
from tools.benchmarks.training.loops import BETAS, CLIP, DECAY, LR


def train_own(case: Case, boundary: Boundary) -> None:
    """Trains all steps of a case. `boundary` is called around each turn of the training loop."""
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


def run_values(case: Case) -> dict[str, Any]:
    """The run file."""
    return {
        "name": case.contestant,
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


class Clock:
    """Seconds that named parts of a step take, by calls that are wrapped.

    A part that runs within another is taken out of that one: the seconds add up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._within: list[float] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Counts the calls of owner.name from now on."""
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
        """Seconds since the last call, by part."""
        found, self.seconds = dict(self.seconds), defaultdict(float)
        return found


def watch_parts(clock: Clock) -> None:
    """Wraps what a step of a run consists of. Call before the run begins."""
    from megagrow.data.batches import BatchReader
    from megagrow.parallel import engine as zero
    from megagrow.train import loop
    from megagrow.train.reporting import run_logger as recorder

    clock.wrap(BatchReader, "read", "reading batches")
    clock.wrap(zero.ZeroEngine, "forward", "forward")
    clock.wrap(zero.ZeroEngine, "backward", "backward")
    clock.wrap(zero.ZeroEngine, "step", "DeepSpeed's step without AdamW")
    clock.wrap(torch.optim.AdamW, "step", "AdamW")
    clock.wrap(dist, "all_reduce", "votes and sums over ranks")
    clock.wrap(recorder.RunLogger, "step", "metrics")
    clock.wrap(loop, "train_at", "the rest of the step: loss, rate, masks")
    clock.wrap(loop, "_measured_step", "measures, memory, counters")
