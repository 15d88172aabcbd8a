"""Benchmark training, start-up and `prepare` on the CPU against other implementations.

    python tools/benchmarks/training/run.py --output bench_training

Writes training.json and training.md. See --help.
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tools.benchmarks.training.gate import TrainingCase  # noqa: E402
from tools.benchmarks.training.prepare import corpus_of, prepare_speeds  # noqa: E402
from tools.benchmarks.training.tables import markdown, summary  # noqa: E402
from tools.benchmarks.training.turns import (  # noqa: E402
    new_folder,
    run_rounds,
    start,
    wait_for_all,
)

CONFIGURATIONS = {
    "ours": 1,
    "ours, timed": 1,
    "ours, ZeRO 1": 1,
    "loop, our model": 1,
    "loop, HF model": 1,
    "loop, litgpt": 1,
    "Trainer": 1,
    "Trainer + DeepSpeed": 1,
    "ours: 2 ranks": 2,
    "loop, our model: 2 ranks": 2,
    "Trainer: 2 ranks": 2,
    "Trainer + DeepSpeed: 2 ranks": 2,
}
"""Name -> number of ranks."""
UNSHARDED = ("ours", "ours, timed")
"""Configurations with ZeRO 0, like the loops; all others with DeepSpeed use ZeRO 1."""
NEEDS = {"loop, litgpt": "litgpt", "loop, HF model": "transformers"}
NEEDS |= {name: "accelerate" for name in CONFIGURATIONS if name.startswith("Trainer")}
"""Configuration -> package that must be installed."""


@dataclass(frozen=True)
class BenchmarkSize:
    """Model, batch, number of steps, and bytes of text to tokenize."""

    model: dict[str, int]
    sequence: int
    batch: int
    micro: int
    rounds: int
    steps: int
    """Steps per turn."""
    text_bytes: int


FULL = BenchmarkSize(
    model={
        "num_hidden_layers": 8,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 688,
        "vocab_size": 4096,
        "max_position_embeddings": 256,
    },
    sequence=256,
    batch=8,
    micro=4,
    rounds=6,
    steps=2,
    text_bytes=16_000_000,
)
QUICK = BenchmarkSize(
    model=FULL.model
    | {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 512},
    sequence=32,
    batch=2,
    micro=1,
    rounds=2,
    steps=1,
    text_bytes=200_000,
)


def main(
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("bench_training"),
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Configurations, repeatable: {'; '.join(CONFIGURATIONS)}."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Total threads per configuration. Default: one per core.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Number of rounds.")] = None,
    preparing: Annotated[bool, typer.Option(help="Also measure `prepare`.")] = True,
    quick: Annotated[bool, typer.Option(help="Use a tiny model, as a test.")] = False,
) -> None:
    """Measure training, start-up and tokenization on the CPU against other implementations.

    All configurations train the same model on the same corpus in fp32 with the same total number of
    threads. They train a few steps at a time, in turn. A speedup is the median over rounds of the
    ratio within a round. CPU time of all threads is reported in addition to wall time, because
    other load on the machine affects it less. Configurations whose packages are not installed are
    skipped and listed.
    """
    output.mkdir(parents=True, exist_ok=True)
    console, begin, size = Console(), time.perf_counter(), QUICK if quick else FULL
    size = replace(size, rounds=rounds or size.rounds)
    cores = threads or len(os.sched_getaffinity(0))
    names = only or list(CONFIGURATIONS)
    missing = [name for name in names if name in NEEDS and find_spec(NEEDS[name]) is None]
    results: dict[str, Any] = {
        "model": size.model,
        "tokens_of_a_step": size.batch * size.sequence,
        "threads": cores,
        "not_installed": missing,
    }
    with ExitStack() as stack:
        folder = new_folder(stack)
        text, corpus = corpus_of(folder, size.text_bytes, size.model["vocab_size"])
        installed = [name for name in names if name not in missing]
        configurations = []
        for name in installed:
            case = case_of(name, size, cores, corpus, folder)
            configurations.append(start(case, stack))
            seconds = configurations[-1].start_seconds
            console.print(f"{name}: time to first step {seconds:.1f} s", highlight=False)
        run_rounds(configurations)
        wait_for_all(configurations)
        results["training"] = [summary(configuration) for configuration in configurations]
        if preparing:
            results["prepare"] = prepare_speeds(text, corpus.parent, folder, cores)
    results["seconds"] = time.perf_counter() - begin
    table = markdown(results)
    (output / "training.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (output / "training.md").write_text(table, encoding="utf-8")
    console.print(Markdown(table))


def case_of(name: str, size: BenchmarkSize, cores: int, corpus: Path, folder: Path) -> TrainingCase:
    """Return the workload of a configuration."""
    ranks, number = CONFIGURATIONS[name], list(CONFIGURATIONS).index(name)
    return TrainingCase(
        configuration=name,
        ranks=ranks,
        threads=max(1, cores // ranks),
        model=size.model,
        sequence=size.sequence,
        batch=size.batch,
        micro=size.micro,
        turns=(1, 1, *[size.steps] * size.rounds),
        corpus=str(corpus),
        folder=str(folder / f"configuration-{number}"),
        address=str(folder / f"socket-{number}"),
        zero_stage=0 if name in UNSHARDED else 1,
    )


if __name__ == "__main__":
    typer.run(main)
