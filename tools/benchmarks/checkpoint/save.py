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

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.markdown import Markdown

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
    "421M": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 32},
}
REPEATS = 3
"""Number of saves of each kind."""
LENGTH = 64
"""Tokens per sequence; each rank trains one sequence per step."""

COLUMNS = {
    "parameters": "{size}",
    "ranks": "{ranks}",
    "MiB": "{mib:.0f}",
    "step s": "{step:.2f}",
    "blocking: stall s": "{blocking:.2f}",
    "copy first: stall s": "{copied:.3f}",
    "background: stall s": "{stall:.3f}",
    "background: longest stall s": "{longest:.3f}",
    "blocking / background": "{ratio:.0f}",
    "background: until on disk s": "{seconds:.2f}",
    "background: step s meanwhile": "{busy:.2f}",
}


def main(
    output: Annotated[Path, typer.Option(help="The Markdown file.")] = Path("bench_save.md"),
    size: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(SIZES)}.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Repeatable. Default: 1 and 2.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder on the disk to measure.")] = None,
    case: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure saves of a training run under ZeRO 2 on the CPU.

    One run saves its state several times while training waits, several times in the background
    after a copy of the state (`copy first`), and several times in the background with the copy made
    during the next step. The save with the shortest stall of each kind counts. All files are synced
    to disk and read back.
    """
    if case is not None:
        name, _, path = case.partition(":")
        measure(name, path, output)
        return
    rows: list[list[str]] = []
    for world in ranks or (1, 2):
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
    stage.engine.before_update(saver.wait_for_copy)
    steps = [_step(run, stage) for _ in range(3)]
    blocking, copied, background = list[Saved](), list[Saved](), list[Saved]()
    busy: list[float] = []
    for number in range(0, 3 * REPEATS, 3):
        blocking.append(_save_blocking(saver, stage, number))
        copied.append(_save_in_background(saver, run, stage, number + 1, [], copy_first=True))
        background.append(_save_in_background(saver, run, stage, number + 2, busy))
    values: dict[str, Any] = {
        "step": min(steps),
        "blocking": min(saved.stall_seconds for saved in blocking),
        "copied": min(saved.stall_seconds for saved in copied),
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
        values["ratio"] = values["blocking"] / values["stall"]
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


def _save_blocking(saver: Saver, stage: Stage, number: int) -> Saved:
    """Save while the training waits."""
    _begin(saver, stage, number, background=False)
    return _finish(saver)


def _save_in_background(
    saver: Saver,
    run: RunConfig,
    stage: Stage,
    number: int,
    busy: list[float],
    copy_first: bool = False,
) -> Saved:
    """Save in the background; append the seconds of the steps trained meanwhile to `busy`."""
    _begin(saver, stage, number, background=True)
    if copy_first:
        saver.wait_for_copy()
    writing = torch.ones(1)
    while writing:
        busy.append(_step(run, stage))
        writing = torch.tensor([float(saver.writing)])
        dist.all_reduce(writing, op=dist.ReduceOp.MAX)
    return _finish(saver)


if __name__ == "__main__":
    typer.run(main)
