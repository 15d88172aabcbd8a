"""Benchmark checkpoint saves: training stall of blocking and of background saves.

    python tools/benchmarks/checkpoint/save.py --output bench_save.md

Writes a Markdown table. See --help.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.markdown import Markdown

from megagrow.checkpoint import shards
from megagrow.checkpoint.async_saver import Saved, Saver
from megagrow.checkpoint.manifest import Manifest, describe_layout
from megagrow.checkpoint.retention import Retention, has_right_sizes, prune_checkpoints
from megagrow.common.tables import markdown_table
from megagrow.config.schema import RunConfig
from megagrow.data.batches import Batch
from megagrow.parallel.launch import read_launch
from megagrow.parallel.process_groups import init_process_group, leave_process_group
from megagrow.train.loop import train_at
from megagrow.train.stage import Stage, build_stage

SIZES: dict[str, dict[str, int]] = {
    "46M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12},
    "168M": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 12},
}
REPEATS = 4
"""Number of saves of each kind."""
LENGTH = 64
"""Tokens per sequence; each rank trains one sequence per step."""

COLUMNS = {
    "parameters": "{size}",
    "ranks": "{ranks}",
    "MiB": "{mib:.0f}",
    "step s": "{step:.2f}",
    "blocking: stall s": "{blocking:.2f}",
    "blocking, no checksums: stall s": "{no_checksum:.2f}",
    "background: stall s": "{stall:.2f}",
    "background: longest stall s": "{longest:.2f}",
    "background: until on disk s": "{seconds:.2f}",
    "background: step s meanwhile": "{busy:.2f}",
}


def main(
    output: Annotated[Path, typer.Option(help="The Markdown file.")] = Path("bench_save.md"),
    size: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(SIZES)}.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Repeatable. Default: 2 and 4.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder on the disk to measure.")] = None,
    case: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure saves of a training run under ZeRO 2 on the CPU.

    One run saves the same state several times while training waits, with and without checksums, and
    several times in the background. The fastest save of each kind counts. All files are synced to
    disk.
    """
    if case is not None:
        name, _, path = case.partition(":")
        measure(name, path, output)
        return
    rows: list[list[str]] = []
    for world in ranks or (2, 4):
        for name in size or SIZES:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                launcher = (
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    f"--nproc-per-node={world}",
                )
                words = [sys.executable, *launcher, __file__, "--case", f"{name}:{place}"]
                subprocess.run([*words, "--output", str(Path(place, "out.json"))], check=True)
                values = json.loads(Path(place, "out.json").read_text(encoding="utf-8"))
            rows.append([cell.format(**values) for cell in COLUMNS.values()])
            output.write_text(markdown_table([*COLUMNS], rows) + "\n", encoding="utf-8")
    Console().print(Markdown(markdown_table([*COLUMNS], rows)))


def measure(name: str, folder: str, output: Path) -> None:
    """Measure a case on one rank; rank 0 writes the results, the seconds of the slowest rank."""
    device = init_process_group(read_launch())
    torch.set_num_threads(1)
    world = dist.get_world_size()
    run = _run(name, world, folder)
    stage = build_stage(run, 0, device)
    for kinds in stage.engine.storage().values():
        kinds["fp32"].normal_(std=0.02)
    stage.engine.ready(adam_step=0)
    saver = Saver(Path(folder, "checkpoints"), device)
    saver.prepare(stage.layout, stage.engine.storage())
    steps = [_step(run, stage) for _ in range(4)]
    blocking, no_checksum = [], []
    for number in range(0, 2 * REPEATS, 2):
        blocking.append(_save_blocking(saver, stage, number))
        with mock.patch.object(shards.xxhash, "xxh3_64", _NoHash):
            no_checksum.append(_save_blocking(saver, stage, number + 1))
    busy: list[float] = []
    numbers = range(2 * REPEATS, 3 * REPEATS)
    background = [_save_in_background(saver, run, stage, number, busy) for number in numbers]
    values: dict[str, Any] = {
        "step": min(steps),
        "blocking": min(saved.stall_seconds for saved in blocking),
        "no_checksum": min(saved.stall_seconds for saved in no_checksum),
        "stall": min(saved.stall_seconds for saved in background),
        "longest": max(saved.stall_seconds for saved in background),
        "seconds": min(saved.seconds for saved in background),
        "busy": min(busy),
    }
    highest = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    values = dict(zip(values, highest.tolist(), strict=True))
    total = sum(record.size for record in blocking[0].manifest.files.values())
    if dist.get_rank() == 0:
        values |= {"size": name, "ranks": world, "mib": total / 2**20}
        output.write_text(json.dumps(values), encoding="utf-8")
    stage.release()
    leave_process_group()


def _run(name: str, world: int, folder: str) -> RunConfig:
    model = SIZES[name] | {"num_attention_heads": 16, "vocab_size": 8192}
    stage = {"model": model, "tokens": 10**9, "parallel": {"zero_stage": 2}}
    stage |= {"optimizer": {"lr": 1e-4}}
    stage["batch"] = {"global_batch_size": world, "micro_batch_size": 1}
    data = {"train": [{"path": "unused"}], "sequence_length": LENGTH}
    values = {"name": "bench", "output_dir": folder, "data": data, "stages": [stage]}
    return RunConfig.model_validate(values)


def _step(run: RunConfig, stage: Stage) -> float:
    """Train one step on random tokens and return its seconds."""
    begin = time.perf_counter()
    tokens, positions = torch.randint(8192, (1, LENGTH + 1)), torch.arange(LENGTH)[None]
    train_at(run, stage, 0, [Batch(tokens[:, :-1], tokens[:, 1:], positions, None)])
    return time.perf_counter() - begin


def _begin(saver: Saver, stage: Stage, number: int, background: bool) -> None:
    layout, storage = stage.layout, stage.engine.storage()
    model = stage.config.model.model_dump()
    manifest = Manifest(model, describe_layout(layout), stage.engine.adam_step, {}, {}, files={})
    dist.barrier()
    saver.begin(number, layout, storage, manifest, background=background)


def _finish(saver: Saver) -> Saved:
    saved = saver.finish()
    assert saved is not None
    if dist.get_rank() == 0:
        prune_checkpoints(saved.path.parent, Retention(1), has_right_sizes)
    dist.barrier()
    return saved


class _NoHash:
    """Stand-in for xxh3 that computes no checksum."""

    def update(self, data: memoryview) -> None:
        """Ignore the data."""

    def hexdigest(self) -> str:
        return ""


def _save_blocking(saver: Saver, stage: Stage, number: int) -> Saved:
    """Save while the training waits."""
    _begin(saver, stage, number, background=False)
    return _finish(saver)


def _save_in_background(
    saver: Saver, run: RunConfig, stage: Stage, number: int, busy: list[float]
) -> Saved:
    """Save in the background; append the seconds of the steps trained meanwhile to `busy`."""
    _begin(saver, stage, number, background=True)
    writing = torch.ones(1)
    while writing:
        busy.append(_step(run, stage))
        writing = torch.tensor([float(saver.writing)])
        dist.all_reduce(writing, op=dist.ReduceOp.MAX)
    return _finish(saver)


if __name__ == "__main__":
    typer.run(main)
