"""`megagrow eval`: evaluate a checkpoint on lm-eval tasks."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from megagrow.cli.options import (
    AnySource,
    ForwardDtype,
    JsonOutput,
    LaunchedTensorParallel,
    RunTokenizer,
    count,
)
from megagrow.common.log_setup import configure_logging
from megagrow.common.tables import (
    print_json,
    print_lines,
    print_table,
    stdout_to_stderr,
    table_console,
)
from megagrow.errors import ConfigError

COLUMNS = ("task", "metric", "value", "standard error")


def evaluate(
    checkpoint: AnySource,
    tasks: Annotated[
        str,
        typer.Option(help="Comma-separated lm-eval tasks; gstack: the paper's eight tasks."),
    ] = "gstack",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of local task data; default: Hugging Face Hub.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 16,
    limit: Annotated[int | None, typer.Option(parser=count, help="Documents per task.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    keep: Annotated[
        bool, typer.Option(help="Also store the results in the run directory, for its report.")
    ] = True,
    tokenizer: RunTokenizer = None,
    tp: LaunchedTensorParallel = 1,
    dtype: ForwardDtype = None,
    as_json: JsonOutput = False,
) -> None:
    """Evaluate a checkpoint on lm-eval tasks, in one process or under torchrun."""
    from megagrow.evaluation.evaluator import require_lm_eval

    require_lm_eval()
    from megagrow.evaluation.launched import watched_topology
    from megagrow.evaluation.results_store import find_run
    from megagrow.evaluation.runner import evaluate_checkpoint
    from megagrow.formats.open_source import require_source
    from megagrow.parallel.agreement import run_on_all_ranks
    from megagrow.parallel.launch import read_launch

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    launch = read_launch()
    configure_logging(rank=launch.rank, world_size=launch.world_size)
    if not names:
        raise ConfigError("--tasks: empty; list at least one task")
    require_source(checkpoint)  # before tasks are downloaded
    with stdout_to_stderr(as_json) as stdout, watched_topology(tp) as topology:
        record = evaluate_checkpoint(
            checkpoint,
            names,
            topology,
            data_dir=data_dir,
            batch_size=batch_size,
            limit=limit,
            tokenizer=tokenizer,
            dtype=dtype,
        )
        run = find_run(Path(record["checkpoint"])) if keep else None
        if topology.rank == 0 and as_json:
            print_json(record, stdout)
        elif topology.rank == 0:
            print_table(
                table_console(),
                COLUMNS,
                _rows(record),
                title=record["checkpoint"],
                right_aligned=COLUMNS[2:],
            )
        run_on_all_ranks(partial(_write, record, output, run, topology.rank == 0))


def _write(record: dict[str, Any], output: Path | None, run: Path | None, first: bool) -> None:
    """Write the results on rank 0: to the output file and to the run directory."""
    from megagrow.evaluation.results_store import store_results, write_results
    from megagrow.evaluation.runner import average

    if first and output is not None:
        write_results(output, record)
    if first and run is not None:
        stored = store_results(record, run, average)
        print_lines(table_console(), [f"results stored for the report of the run: {stored}"])


def _rows(record: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for task, metrics in record["results"].items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr")
                yield task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"
    if record["average"] is not None:
        yield "average", "acc_norm or acc", f"{record['average']:.4f}", ""
