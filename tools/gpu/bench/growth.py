"""Benchmark of growth in real GPU runs: time, memory and training stall.

    python tools/gpu/bench/growth.py 410m|cold|warm --output growth.jsonl [--smoke]

Started by gpu_check.py. `410m` is the paper's recipe, 6 layers stacked to 24, cut to 12 steps per
stage: its growth changes no kernel. `cold` and `warm` double a model's width, which changes the
kernels; start each with an empty Triton cache folder. `cold` skips the warm-up of the next stage's
kernels. `warm` waits until they are compiled, as happens in a stage of ordinary length. The text is
random tokens.
"""

import argparse
import json
import shutil
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megagrow.config.load import load_run  # noqa: E402
from megagrow.config.schema import RunConfig  # noqa: E402
from megagrow.data.indexed import IndexedWriter  # noqa: E402
from megagrow.run import train  # noqa: E402
from megagrow.train import kernel_selection  # noqa: E402
from megagrow.train.kernel_warmup import WarmUp  # noqa: E402
from megagrow.train.reporting.metrics import METRICS_FILE, read_metrics  # noqa: E402

Record = dict[str, Any]
CASES = ("410m", "cold", "warm")
STEPS, BATCH, MICRO = 12, 32, 8
NARROW = {
    "num_hidden_layers": 6,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "intermediate_size": 1408,
    "vocab_size": 32000,
}
WIDE = NARROW | {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 2816}
TINY = NARROW | {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
TINY |= {"intermediate_size": 48, "vocab_size": 101}
TINY_WIDE = TINY | {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}


def main() -> None:
    """Train the run of a case to its end and write a record of its growth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    folder = options.output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    run = make_run(options.case, folder, options.smoke)
    patches = {
        "cold": mock.patch.object(WarmUp, "prepare", lambda *arguments: None),
        "warm": mock.patch.object(WarmUp, "report", WarmUp.wait),
    }
    # The self-check would compile the kernels of both stages at the start.
    passed = mock.patch.object(
        kernel_selection, "check_calls", lambda calls, *_: dict.fromkeys(calls)
    )
    with passed, patches.get(options.case, nullcontext()):
        train(run)
    records = read_metrics(run.output_dir / METRICS_FILE)
    record = {"kind": "growth", "case": options.case} | summary(records)
    options.output.write_text(json.dumps(record) + "\n", encoding="utf-8")
    shutil.rmtree(folder)  # checkpoints of gigabytes


def make_run(case: str, folder: Path, smoke: bool) -> RunConfig:
    """Return the run of a case, after writing its corpora."""
    if smoke:
        models, operator = (TINY, TINY_WIDE), "direct_width"
    elif case == "410m":
        models, operator = ("llama-410m-6l", "llama-410m"), "direct_depth"
    else:
        models, operator = (NARROW, WIDE), "direct_width"
    length, batch, micro = (16, 2, 1) if smoke else (2048, BATCH, MICRO)
    steps, vocabulary = (3, 101) if smoke else (STEPS, 32000)
    tokens = steps * batch * length
    for seed, name in enumerate(("train", "validation")):
        write_corpus(folder / name, 2 * tokens + length, vocabulary, seed)
    stages: list[Record] = [{"model": model, "tokens": tokens} for model in models]
    stages[1]["growth"] = {"operator": operator}
    values = {
        "name": f"growth-{case}",
        "output_dir": str(folder / "run"),
        "data": {
            "train": [{"path": str(folder / "train")}],
            "validation": [{"path": str(folder / "validation")}],
            "sequence_length": length,
        },
        "batch": {"global_batch_size": batch, "micro_batch_size": micro},
        "optimizer": {"lr": 6e-4, "min_lr": 6e-5},
        "schedule": {"type": "cosine", "warmup_steps": 2},
        "validation": {"tokens": batch * length},
        "logging": {"tensorboard": False},
        "stages": stages,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return load_run(path)


def write_corpus(prefix: Path, tokens: int, vocabulary: int, seed: int) -> None:
    """Write random documents of a thousand tokens."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(tokens // 1000 + 1):
            writer.add_document(generator.integers(vocabulary, size=1000, dtype=np.uint16))
        writer.finalize()


def summary(records: list[Record]) -> Record:
    """Return the cost of a run's growth and of the steps around it.

    `event_seconds` is the full event, including the losses on a fixed batch before and after it.
    `stall_seconds` also includes the excess time of the first step after it over the later steps.
    """
    position = next(index for index, record in enumerate(records) if record["kind"] == "growth")
    growth = records[position]
    event = growth["lost_seconds"] - records[position - 1]["lost_seconds"]
    steps = [[r for r in records if r["kind"] == "train" and r["stage"] == s] for s in (0, 1)]
    medians = [statistics.median(r["seconds"] for r in stage[1:]) for stage in steps]
    first = steps[1][0]["seconds"]
    fields = ("seconds", "bytes_within_ranks", "peak_memory_bytes", "loss_before", "loss_after")
    return {name: growth[name] for name in fields} | {
        "event_seconds": event,
        "first_step_seconds": first,
        "base_step_seconds": medians[0],
        "step_seconds": medians[1],
        "stall_seconds": event + first - medians[1],
    }


if __name__ == "__main__":
    main()
