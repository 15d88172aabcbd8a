"""Measure when each rank runs its passes in a pipeline, and draw it beside the schedule.

    torchrun --nproc-per-node 4 tools/experiments/pipeline_timeline.py OUT.png --pace 40

Trains steps of a small model on all ranks with 1F1B and with two chunks per rank. `--pace` fills up
every forward pass of a rank to a number of milliseconds, and every backward pass to twice as many,
by sleeping: so more ranks than cores do not compete. 0 measures the computation itself. Rank 0
writes the picture and prints the idle time relative to the work, beside (p - 1) / (m v) of
Narayanan et al. 2021.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from matplotlib import pyplot
from matplotlib.axes import Axes

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from megagrow.config.schema import RunConfig  # noqa: E402
from megagrow.data.batches import Batch  # noqa: E402
from megagrow.parallel.launch import read_launch  # noqa: E402
from megagrow.parallel.pipeline.schedule import (  # noqa: E402
    Pass,
    Timeline,
    needed,
    timeline,
)
from megagrow.parallel.process_groups import (  # noqa: E402
    init_process_group,
    leave_process_group,
)
from megagrow.reshard.fill import fill_initial  # noqa: E402
from megagrow.train.stage import Stage, build_stage  # noqa: E402
from megagrow.train.step import train_step  # noqa: E402

LENGTH, VOCAB, STEPS = 128, 512, 3
FORWARD, BACKWARD = "#4c78a8", "#54a24b"
SECOND_CHUNK = 0.6
"""Opacity of the second chunk of a rank."""


class Interval(NamedTuple):
    """Time of one pass on a rank, in any unit."""

    each: Pass
    begin: float
    end: float


Rows = list[list[Interval]]
"""Passes by rank, in order."""


def main() -> None:
    """Measure both schedules on all ranks; rank 0 draws them."""
    arguments = _parse()
    device = init_process_group(read_launch())
    ranks, micro_batches = dist.get_world_size(), arguments.micro_batches
    panels: dict[str, Rows] = {}
    for virtual in (1, 2):
        line = timeline(ranks, virtual, micro_batches)
        measured = _measure(line, virtual, device, arguments)
        name = "1F1B" if virtual == 1 else f"interleaved 1F1B, {virtual} chunks per rank"
        panels[f"{name}: schedule, backward = 2 x forward"] = scheduled(line)
        panels[f"{name}: measured, ms"] = measured
        if dist.get_rank() == 0:
            formula = (ranks - 1) / (micro_batches * virtual)
            print(f"{name}: idle / work {idle_share(measured):.1%}, formula {formula:.1%}")
    if dist.get_rank() == 0:
        _draw(panels, arguments.output)
    leave_process_group()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw the measured passes of a pipeline.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--pace", type=float, default=0.0, help="ms per forward pass of a rank")
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    return parser.parse_args()


def _run(virtual: int, arguments: argparse.Namespace) -> RunConfig:
    width = arguments.hidden_size
    model = {
        "num_hidden_layers": arguments.layers,
        "hidden_size": width,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "intermediate_size": 3 * width,
        "vocab_size": VOCAB,
        "max_position_embeddings": LENGTH,
    }
    stage = {
        "model": model,
        "tokens": arguments.micro_batches * LENGTH,
        "data": {"train": [{"path": "none"}], "sequence_length": LENGTH},
        "batch": {"global_batch_size": arguments.micro_batches, "micro_batch_size": 1},
        "optimizer": {"lr": 1e-3},
        "parallel": {
            "pipeline_model_parallel_size": dist.get_world_size(),
            "virtual_pipeline_model_parallel_size": virtual,
        },
    }
    return RunConfig.model_validate({"name": "timeline", "output_dir": "none", "stages": [stage]})


def _measure(
    line: Timeline, virtual: int, device: torch.device, arguments: argparse.Namespace
) -> Rows:
    """Return the passes of the last of some steps on all ranks, in ms after its beginning."""
    run = _run(virtual, arguments)
    stage = build_stage(run, 0, device)
    rank = stage.topology.rank
    fill_initial(stage.layout, rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    batches = [_batch(index) for index in range(arguments.micro_batches)]
    seconds = arguments.pace / 1e3 / virtual
    intervals: list[tuple[float, float]] = []
    _record(stage, intervals, seconds)
    for _ in range(STEPS):
        dist.barrier()
        intervals.clear()
        train_step(stage, batches, lr=1e-3, masks=None)
    stage.release()
    order = [each for each in line[rank] if each is not None]
    mine = [Interval(each, *times) for each, times in zip(order, intervals, strict=True)]
    rows: Rows = [[] for _ in line]
    dist.all_gather_object(rows, mine)
    first = min(row[0].begin for row in rows)
    return [
        [Interval(each, 1e3 * (begin - first), 1e3 * (end - first)) for each, begin, end in row]
        for row in rows
    ]


def _batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (1, LENGTH + 1), generator=generator)
    return Batch(ids[:, :-1], ids[:, 1:].contiguous(), torch.arange(LENGTH)[None], None)


def _record(stage: Stage, intervals: list[tuple[float, float]], seconds: float) -> None:
    """Record begin and end of each pass of an engine, at least `seconds` and twice as long."""
    engine: Any = stage.engine
    engine.forward = _timed(engine.forward, intervals, seconds)
    engine.backward = _timed(engine.backward, intervals, 2 * seconds)


def _timed(
    function: Callable[..., Any], intervals: list[tuple[float, float]], seconds: float
) -> Callable[..., Any]:
    def timed(*inputs: Any, **options: Any) -> Any:
        begin = time.monotonic()  # the clock of the host, which all ranks share
        result = function(*inputs, **options)
        time.sleep(max(0.0, begin + seconds - time.monotonic()))
        intervals.append((begin, time.monotonic()))
        return result

    return timed


def scheduled(line: Timeline) -> Rows:
    """Return the passes of a schedule without transfer times; a forward pass takes 1."""
    last = max(each.chunk for row in line for each in row if each is not None)
    ends: dict[Pass | None, float] = {None: 0.0}
    rows: Rows = [[] for _ in line]
    for now in zip(*line, strict=True):
        for row, each in zip(rows, now, strict=True):
            if each is not None:
                begin = max(ends[needed(each, last)], row[-1].end if row else 0.0)
                row.append(Interval(each, begin, begin + (1 if each.is_forward else 2)))
        ends |= {row[-1].each: row[-1].end for row in rows if row}
    return rows


def idle_share(rows: Rows) -> float:
    """Return the idle time of all ranks between the first and the last pass over their work."""
    span = max(row[-1].end for row in rows) - min(row[0].begin for row in rows)
    work = sum(interval.end - interval.begin for row in rows for interval in row)
    return len(rows) * span / work - 1


def _draw(panels: Mapping[str, Rows], output: Path) -> None:
    figure, axes = pyplot.subplots(len(panels), figsize=(12, 2.1 * len(panels)))
    for panel, (name, rows) in zip(axes, panels.items(), strict=True):
        _draw_rows(panel, rows)
        panel.set_title(f"{name} (idle / work {idle_share(rows):.1%})", fontsize=10, loc="left")
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def _draw_rows(panel: Axes, rows: Sequence[Sequence[Interval]]) -> None:
    for rank, row in enumerate(rows):
        for each, begin, end in row:
            panel.barh(
                rank,
                end - begin,
                left=begin,
                color=FORWARD if each.is_forward else BACKWARD,
                alpha=1.0 if each.chunk < len(rows) else SECOND_CHUNK,
                edgecolor="white",
            )
            middle = (begin + end) / 2
            text = str(each.micro_batch)
            ink = "white" if each.chunk < len(rows) else "black"
            panel.text(middle, rank, text, ha="center", va="center", fontsize=7, color=ink)
    panel.set_yticks(range(len(rows)), [f"rank {rank}" for rank in range(len(rows))])
    panel.invert_yaxis()
    panel.set_xlim(left=0)


if __name__ == "__main__":
    main()
