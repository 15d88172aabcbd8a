"""Small run for fault injection: run file, ranks, progress and comparison of results."""

import gc
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megagrow.data.indexed import IndexedWriter

BASE_STEPS, STAGE_STEPS, INTERVAL = 12, 5, 3
STAGES = 6
STEPS = BASE_STEPS + (STAGES - 1) * STAGE_STEPS
BATCH, LENGTH, VOCABULARY = 4, 16, 101
RAMP_BATCHES = (2, 2, 3, 3, 4)
"""Sequences per rank in the steps of the stage with a batch ramp."""
MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
TIMES = ("elapsed_seconds", "lost_seconds")
"""Counters of elapsed time."""

_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class RunSnapshot:
    """Progress of a run, read from its files."""

    starts: tuple[int, ...] = ()
    """First step of each start."""
    step: int = 0
    """Last recorded step."""
    grown: bool = False
    saving: bool = False
    finished: int = 0
    """Step of the newest finished checkpoint, or 0."""

    def phase(self, starts_before: int) -> str:
        """Return the phase of the run, given the number of earlier starts."""
        if len(self.starts) == starts_before:
            return "start"
        if self.saving:
            return "save"
        return "growth" if self.step == BASE_STEPS and not self.grown else "steps"


def write_corpora(prefix: Path) -> None:
    """Write the corpora of `run_of`."""
    for seed, path in enumerate((prefix, other_corpus(prefix))):
        _write_corpus(path, seed)


def other_corpus(prefix: Path) -> Path:
    """Return the prefix of the corpus of the later stages."""
    return prefix.with_name(f"{prefix.name}-other")


def _write_corpus(prefix: Path, seed: int) -> None:
    """Write a corpus in which most tokens are a function of the previous token."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(40):
            tokens = [int(generator.integers(VOCABULARY))]
            for noise in generator.integers(5 * VOCABULARY, size=100).tolist():
                tokens.append(noise if noise < VOCABULARY else (tokens[-1] * 7 + 3) % VOCABULARY)
            writer.add_document(np.array(tokens))
        writer.finalize()


def run_of(corpus: Path, output: Path, ranks: int, pipeline_ranks: int = 1) -> dict[str, Any]:
    """Return the contents of the run file: stages of every kind, saved often.

    After the base, a stage each doubles the layers, reads other data, has longer sequences, ramps
    its batch, and anneals the learning rate. With pipeline ranks, each holds two chunks of layers
    after the growth.
    """
    tokens = STAGE_STEPS * BATCH * ranks * LENGTH
    other = {"train": [{"path": str(other_corpus(corpus))}, {"path": str(corpus)}]}
    longer = {**other, "sequence_length": 2 * LENGTH}
    sizes = [ranks * size for size in RAMP_BATCHES]
    ramp = {"rampup_batch_size": [sizes[0], ranks, sum(sizes[:2]) * 2]}
    stages: list[dict[str, Any]] = [
        {"tokens": BASE_STEPS * BATCH * ranks * LENGTH, "model": MODEL},
        {"tokens": tokens, "growth": {"operator": "direct_depth"}},
        {"tokens": tokens, "data": other},
        {"tokens": 2 * tokens, "data": longer},
        {"tokens": 2 * sum(sizes) * LENGTH, "data": longer, "batch": ramp},
        {
            "tokens": 2 * tokens,
            "data": longer,
            "schedule": {"type": "linear", "warmup_steps": 0, "restart": True},
        },
    ]
    chunks = "virtual_pipeline_model_parallel_size"
    parallel = {"zero_stage": 2, "pipeline_model_parallel_size": pipeline_ranks}
    if pipeline_ranks > 1:
        parallel[chunks], stages[0]["parallel"] = 2, {chunks: 1}
    return {
        "name": "fault injection",
        "output_dir": str(output),
        "data": {
            "train": [{"path": str(corpus)}],
            "validation": [{"path": str(corpus)}],
            "sequence_length": LENGTH,
        },
        "model": MODEL | {"num_hidden_layers": 4},
        "parallel": parallel,
        "batch": {"global_batch_size": BATCH * ranks, "micro_batch_size": 1},
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 3},
        "checkpoint": {"interval": INTERVAL},
        "validation": {"interval": 5, "tokens": 256},
        "logging": {"tensorboard": False},
        "stages": stages,
    }


def import_all() -> None:
    """Import all modules before ranks are forked; ranks use CPUs, one thread each."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as the command line
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  (DeepSpeed imports it late)

    import megagrow.run  # noqa: F401


def start_ranks(
    run_file: Path, ranks: int, hook: Callable[[int], None] = lambda rank: None
) -> list[Any]:
    """Start `megagrow train RUN_FILE` on local ranks with the launcher variables.

    Each rank calls `hook` with its number before it starts.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [
        _FORK.Process(target=_run_rank, args=(rank, ranks, port, run_file, hook))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def log_of(output: Path, rank: int) -> Path:
    """Return the path of the log of a rank."""
    return output.with_suffix(f".{rank}.log")


def _run_rank(
    rank: int, ranks: int, port: int, run_file: Path, hook: Callable[[int], None]
) -> None:
    gc.freeze()  # a garbage collection would copy all shared pages
    with log_of(run_file, rank).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["megagrow", "train", str(run_file)]
    hook(rank)
    from megagrow.cli.app import main

    main()


def read_snapshot(output: Path) -> RunSnapshot:
    """Read the progress of a run from its files."""
    records = []
    for line in read_text(output / "metrics.jsonl").split("\n"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # a partially written line
    folder = output / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    done = [int(name.removeprefix("step-")) for name in names if "." not in name]
    return RunSnapshot(
        starts=tuple(record["step"] for record in records if record["kind"] == "start"),
        step=max((r["step"] for r in records if r["kind"] == "train"), default=0),
        grown=any(record["kind"] == "growth" for record in records),
        saving=any(name.endswith(".tmp") for name in names),
        finished=max(done, default=0),
    )


def differences(output: Path, expected: Path) -> list[str]:
    """Compare a finished run with the reference run: tensors bit by bit, losses exactly."""
    actual, right = _last_checkpoint(output), _last_checkpoint(expected)
    wrong = [name for name in actual.keys() | right.keys() if actual.get(name) != right.get(name)]
    for kind in ("train", "validation", "growth"):
        if _losses(output, kind) != _losses(expected, kind):
            wrong.append(f"{kind} records")
    return [f"{output}: {name} differs from the reference run" for name in sorted(wrong)]


def _last_checkpoint(output: Path) -> dict[str, Any]:
    """Return the shards and the run state of the last checkpoint, without times."""
    folder = output / "checkpoints" / f"step-{STEPS:09d}"
    state = json.loads(read_text(folder / "manifest.json") or "{}")
    for name in TIMES:
        state.get("run", {}).get("counters", {}).pop(name, None)
    shards = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return {**shards, "manifest.json": [state.get(key) for key in ("model", "run", "adam_step")]}


def _losses(output: Path, kind: str) -> list[Any]:
    names = ("step", "tokens", "flops", "stage", "loss", "lr", "grad_norm", "loss_before")
    records = [json.loads(line) for line in read_text(output / "metrics.jsonl").splitlines()]
    names = (*names, "loss_after", "layers")
    return [[record.get(name) for name in names] for record in records if record["kind"] == kind]


def read_text(path: Path) -> str:
    """Return the text of a file, or an empty text if it does not exist."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
