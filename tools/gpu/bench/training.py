"""Benchmark of training steps on one GPU, in bf16, for each kernel backend.

    python tools/gpu/bench/training.py --output training.jsonl [--smoke]

Started by gpu_check.py. A step is that of a run: forward and backward passes over its
micro-batches, gradient clipping and the update, by DeepSpeed under ZeRO 1. Weights and tokens are
random, the sequence length is 2048. Writes one record per model of the paper and backend, the
largest model last.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megagrow.common.gpu_specs import peak_flops  # noqa: E402
from megagrow.config.load import load_run  # noqa: E402
from megagrow.config.schema import RunConfig  # noqa: E402
from megagrow.config.stage_length import step_tokens  # noqa: E402
from megagrow.data.batches import Batch  # noqa: E402
from megagrow.model.layers.flops import flops_per_token  # noqa: E402
from megagrow.parallel.launch import read_launch  # noqa: E402
from megagrow.parallel.process_groups import init_process_group, leave_process_group  # noqa: E402
from megagrow.train.loop import train_at  # noqa: E402
from megagrow.train.stage import Stage, build_stage  # noqa: E402

WARM_STEPS, STEPS = 2, 3
KEYS = ("attention", "norm", "pointwise", "loss")
BACKENDS: dict[str, dict[str, Any]] = {
    "triton": dict.fromkeys(KEYS, "triton"),
    "triton, chunked loss": dict.fromkeys(KEYS, "triton") | {"linear_cross_entropy": True},
    "torch": {"attention": "sdpa"} | dict.fromkeys(KEYS[1:], "torch"),
}
"""The `kernels` section of a run, by backend name."""


@dataclass(frozen=True)
class TrainingSetup:
    """A model of configs/model/ (or a shape), with a batch that fits on an 80 GB GPU."""

    model: str
    micro: int
    batch: int
    """Sequences per step."""
    sequence: int = 2048
    shape: dict[str, int] | None = None
    """Model config without a file."""


SIZES = (
    TrainingSetup("llama-410m", 8, 32),
    TrainingSetup("llama-1.1b", 4, 32),
    TrainingSetup("llama-3b", 2, 16),
)
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 101,
}
SMOKE_SIZES = (TrainingSetup("tiny", 1, 2, 16, TINY),)


def main() -> None:
    """Train every model with every backend and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = init_process_group(read_launch())
    torch.manual_seed(0)
    with options.output.open("w", encoding="utf-8") as file:
        for size in SMOKE_SIZES if options.smoke else SIZES:
            for backend in BACKENDS:
                record = {"kind": "training", "model": size.model, "backend": backend}
                record |= measure_or_error(size, backend, device, options.output.parent)
                file.write(json.dumps(record) + "\n")
                file.flush()
    leave_process_group()


def measure_or_error(
    size: TrainingSetup, backend: str, device: torch.device, folder: Path
) -> dict[str, Any]:
    """Return the measurements of a step, or the error.

    Running out of memory and unsupported backends are results.
    """
    try:
        return measure_training(make_run(size, backend, folder), device)
    except Exception as error:  # the next backend may succeed
        return {"problem": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def make_run(size: TrainingSetup, backend: str, folder: Path) -> RunConfig:
    """Return the config of the run that is benchmarked."""
    values = {
        "name": size.model,
        "output_dir": str(folder),
        "model": size.shape or size.model,
        "tokens": 10**12,
        "data": {"train": [{"path": "unused"}], "sequence_length": size.sequence},
        "batch": {"global_batch_size": size.batch, "micro_batch_size": size.micro},
        "optimizer": {"lr": 1e-4},
        "kernels": BACKENDS[backend],
    }
    path = folder / "training.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return load_run(path)


def measure_training(run: RunConfig, device: torch.device) -> dict[str, Any]:
    """Return seconds per step (median), tokens/s, model FLOPs utilization and peak memory."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stage = build_stage(run, 0, device)
    try:
        initialize(stage)
        batches = list(random_batches(run))
        per_step = step_tokens(stage.config)
        seconds, losses = [], []
        for step in range(WARM_STEPS + STEPS):
            begin = time.perf_counter()
            result, _ = train_at(run, stage, step * per_step, batches)
            losses.append(result[0].item())  # waits for the GPU
            seconds.append(time.perf_counter() - begin)
    finally:
        stage.release()
    config = run.stages[0]
    step_seconds = statistics.median(seconds[WARM_STEPS:])
    tokens = config.batch.global_batch_size * run.stages[0].data.sequence_length
    flops = flops_per_token(config.model, run.stages[0].data.sequence_length) * tokens
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    return {
        "seconds": step_seconds,
        "first_seconds": seconds[0],
        "tokens_per_second": tokens / step_seconds,
        "mfu": flops / step_seconds / peak if peak else None,
        "memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "loss": losses[-1],
    }


def initialize(stage: Stage) -> None:
    """Set random weights with the initial standard deviation, and zero moments."""
    for name, kinds in stage.engine.storage().items():
        if name.endswith("norm.weight"):
            kinds["fp32"].fill_(1.0)
        else:
            kinds["fp32"].normal_(std=stage.config.model.initializer_range)
        kinds["exp_avg"].zero_()
        kinds["exp_avg_sq"].zero_()
    stage.engine.ready(0)


def random_batches(run: RunConfig) -> Iterator[Batch]:
    """Yield the micro-batches of one step."""
    batch, length = run.stages[0].batch, run.stages[0].data.sequence_length
    positions = torch.arange(length).expand(batch.micro_batch_size, -1).contiguous()
    for _ in range(batch.global_batch_size // batch.micro_batch_size):
        shape = (batch.micro_batch_size, length + 1)
        tokens = torch.randint(run.stages[0].model.vocab_size, shape)
        yield Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, None)


if __name__ == "__main__":
    main()
