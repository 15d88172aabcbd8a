"""Checks megagrow on a GPU machine: the tests marked `gpu`, then a 410M model grown and trained.

    python tools/gpu_check.py [--output gpu_check]

Prints a short table last and writes it as JSON: tokens/s, model FLOPs utilisation and peak memory
before and after the growth, seconds and bytes of the growth. Takes a few minutes on one GPU.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megagrow.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
BATCH = 32  # sequences of 2048 tokens


def main() -> None:
    """Runs everything; exits with an error if a part of it fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_check"))
    output = parser.parse_args().output
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs a GPU: torch.cuda.is_available() is False")
    output.mkdir(parents=True, exist_ok=True)
    _run("-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests"))
    corpus = output / "corpus"
    _run("-m", "megagrow", "prepare", "python-stdlib", "--output", str(corpus),
         "--tokenizer", "train", "--vocab-size", "32000")  # fmt: skip
    table = measure(train(corpus, output / "run"))
    table["device"] = torch.cuda.get_device_name()
    table["versions"] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    (output / "gpu_check.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    for name, value in table.items():
        print(f"{name:32} {value}")


def train(corpus: Path, directory: Path) -> list[dict[str, Any]]:
    """A short grown run of the 410M recipe in bf16; returns its metrics."""
    tokens = STEPS * BATCH * 2048
    changes = {
        "output_dir": directory,
        "data.train.0.path": corpus / "train",
        "data.validation.0.path": corpus / "validation",
        "data.tokenizer": corpus / "tokenizer.model",
        "batch.global_batch_size": BATCH,
        "batch.micro_batch_size": 8,
        "schedule.warmup_steps": 5,
        "validation.tokens": 65536,
        "stages.0.tokens": tokens,
        "stages.1.tokens": tokens,
    }
    overrides = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    _run("-m", "megagrow", "train", str(ROOT / "configs" / "gstack-410m.yaml"), *overrides)
    return read_metrics(directory / "metrics.jsonl")


def measure(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The table: medians over the second half of each stage, and what the growth cost."""
    table: dict[str, Any] = {}
    for stage, name in enumerate(("base", "target")):
        steps = [r for r in records if r["kind"] == "train" and r["stage"] == stage][STEPS // 2 :]
        for field in ("tokens_per_second", "mfu", "memory_bytes", "loss"):
            values = sorted(step[field] for step in steps if step[field] is not None)
            table[f"{name}_{field}"] = values[len(values) // 2] if values else None
    growth = next(r for r in records if r["kind"] == "growth")
    for field in (
        "seconds",
        "bytes_within_ranks",
        "peak_memory_bytes",
        "loss_before",
        "loss_after",
    ):
        table[f"growth_{field}"] = growth[field]
    return table


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    main()
