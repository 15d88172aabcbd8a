"""Speed of the whole on this machine's CPU: training, start-up and `prepare`, against others.

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

from tools.benchmarks.training.gate import Case  # noqa: E402
from tools.benchmarks.training.prepare import corpus_of, prepare_speeds  # noqa: E402
from tools.benchmarks.training.tables import markdown, summary  # noqa: E402
from tools.benchmarks.training.turns import compete, finished, new_folder, started  # noqa: E402

CONTESTANTS = {
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
"""Name -> ranks."""
UNSHARDED = ("ours", "ours, timed")
"""There is nothing to share out at one rank: ZeRO 0, as the loops. All others with DeepSpeed: 1."""
NEEDS = {"loop, litgpt": "litgpt", "loop, HF model": "transformers"}
NEEDS |= {name: "accelerate" for name in CONTESTANTS if name.startswith("Trainer")}
"""What else has to be installed."""


@dataclass(frozen=True)
class Size:
    """What is trained, for how long, and how much text is prepared."""

    model: dict[str, int]
    sequence: int
    batch: int
    micro: int
    rounds: int
    steps: int
    """Of a turn."""
    text_bytes: int


FULL = Size(
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
QUICK = Size(
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
        typer.Option(help=f"Contestants, of: {'; '.join(CONTESTANTS)}. May be repeated."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of each contestant in all; by default one a core.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of turns.")] = None,
    preparing: Annotated[bool, typer.Option(help="Whether to measure `prepare` as well.")] = True,
    quick: Annotated[bool, typer.Option(help="A tiny model: no number means anything.")] = False,
) -> None:
    """Measure training, start-up and preparing on this machine's CPU against other ways.

    All contestants train the same model on the same corpus, in fp32, with as many threads in all.
    They take turns of some steps, one at a time, in rounds; a ratio is taken within a round, and
    the median over the rounds counts. Beside wall time stands the CPU time of all threads, which
    other work on the machine disturbs less. What is not installed is left out, and said so.
    """
    output.mkdir(parents=True, exist_ok=True)
    console, begin, size = Console(), time.perf_counter(), QUICK if quick else FULL
    size = replace(size, rounds=rounds or size.rounds)
    cores = threads or len(os.sched_getaffinity(0))
    names = only or list(CONTESTANTS)
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
        here = [name for name in names if name not in missing]
        cases = [case_of(name, size, cores, corpus, folder) for name in here]
        contestants = []
        for case in cases:
            contestants.append(started(case, stack))
            seconds = contestants[-1].start_seconds
            console.print(f"{case.contestant}: first step after {seconds:.1f} s", highlight=False)
        compete(contestants)
        finished(contestants)
        results["training"] = [summary(contestant) for contestant in contestants]
        if preparing:
            results["prepare"] = prepare_speeds(text, corpus.parent, folder, cores)
    results["seconds"] = time.perf_counter() - begin
    table = markdown(results)
    (output / "training.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (output / "training.md").write_text(table, encoding="utf-8")
    console.print(Markdown(table))


def case_of(name: str, size: Size, cores: int, corpus: Path, folder: Path) -> Case:
    """What a contestant trains."""
    ranks, number = CONTESTANTS[name], list(CONTESTANTS).index(name)
    return Case(
        contestant=name,
        ranks=ranks,
        threads=max(1, cores // ranks),
        model=size.model,
        sequence=size.sequence,
        batch=size.batch,
        micro=size.micro,
        turns=(1, 1, *[size.steps] * size.rounds),
        corpus=str(corpus),
        folder=str(folder / f"contestant-{number}"),
        address=str(folder / f"socket-{number}"),
        zero_stage=0 if name in UNSHARDED else 1,
    )


if __name__ == "__main__":
    typer.run(main)
