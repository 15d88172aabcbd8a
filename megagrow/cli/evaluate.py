"""The command line's `megagrow eval`: a checkpoint on lm-eval's tasks."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megagrow.common.log_setup import configure_logging
from megagrow.errors import ConfigError


def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, a run directory (its newest), or a Hugging Face folder.",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str, typer.Option(help="Of lm-eval, with commas; gstack stands for the paper's eight.")
    ] = "gstack",
    data_dir: Annotated[
        Path | None, typer.Option(help="Local files of the tasks; default: the hub.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a pass.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
    keep: Annotated[
        bool, typer.Option(help="Also in the directory of the checkpoint's run, for its report.")
    ] = True,
    tokenizer: Annotated[
        str | None, typer.Option(help="Default: that of the checkpoint's run.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; default: the latter on GPUs.")
    ] = None,
) -> None:
    """Evaluate a checkpoint on lm-eval's tasks; alone or under torchrun."""
    from megagrow.evaluation.evaluator import need_lm_eval

    need_lm_eval()
    from megagrow.evaluation.lm import init_topology
    from megagrow.evaluation.results_store import find_run
    from megagrow.evaluation.runner import evaluate_checkpoint
    from megagrow.parallel.agreement import run_on_all_ranks
    from megagrow.parallel.launch import read_launch
    from megagrow.parallel.process_groups import leave_process_group

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    topology = init_topology(tp)
    launch = read_launch()
    configure_logging(rank=launch.rank, world_size=launch.world_size)
    if not names:
        raise ConfigError("--tasks: names none")
    found = evaluate_checkpoint(
        checkpoint,
        names,
        topology,
        data_dir=data_dir,
        batch_size=batch_size,
        limit=limit,
        tokenizer=tokenizer,
        dtype=dtype,
    )
    run = find_run(Path(found["checkpoint"])) if keep else None
    if topology.rank == 0:
        Console().print(_table(found))
    run_on_all_ranks(partial(_write, found, output, run, topology.rank == 0))
    leave_process_group()


def _write(found: dict[str, Any], output: Path | None, run: Path | None, first: bool) -> None:
    """On the first rank, the JSON file that was asked for and that in the run's directory."""
    from megagrow.evaluation.results_store import store_results, write_results
    from megagrow.evaluation.runner import average

    if first and output is not None:
        write_results(output, found)
    if first and run is not None:
        path = store_results(found, run, average)
        Console().print(f"kept for the run's report: {path}", soft_wrap=True)


def _table(found: dict[str, Any]) -> Table:
    table = Table(title=found["checkpoint"])
    for column in ("task", "metric"):
        table.add_column(column)
    for column in ("value", "standard error"):
        table.add_column(column, justify="right")
    for task, metrics in found["results"].items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr")
                shown = "" if error is None else f"{error:.4f}"
                table.add_row(task, metric, f"{value:.4f}", shown)
    if found["average"] is not None:
        table.add_row("average", "acc_norm or acc", f"{found['average']:.4f}", "")
    return table
