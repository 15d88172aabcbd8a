"""`megagrow eval`: evaluate a checkpoint on lm-eval tasks."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from megagrow.cli.options import AnySource
from megagrow.common.tables import print_lines, print_table, table_console
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
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    keep: Annotated[
        bool, typer.Option(help="Also store the results in the run directory, for its report.")
    ] = True,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer. Default: the tokenizer of the run.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16. Default: bfloat16 on GPUs.")
    ] = None,
) -> None:
    """Evaluate a checkpoint on lm-eval tasks, in one process or under torchrun."""
    from megagrow.evaluation.evaluator import need_lm_eval

    need_lm_eval()
    from megagrow.evaluation.lm import evaluated, join
    from megagrow.evaluation.model import load
    from megagrow.evaluation.results_store import run_of, standing
    from megagrow.evaluation.runner import evaluate as run_tasks
    from megagrow.evaluation.tasks import load_tasks
    from megagrow.parallel.agreement import run_on_all_ranks
    from megagrow.parallel.process_groups import leave_process_group

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    topology = join(tp)
    if not names:
        raise ConfigError("--tasks: empty; list at least one task")
    loaded_tasks = run_on_all_ranks(lambda: load_tasks(names, data_dir))
    model = load(checkpoint, topology, tokenizer, dtype)
    results = run_tasks(evaluated(model, topology, batch_size), loaded_tasks, limit)
    about = {"checkpoint": str(model.path), **standing(model.run), "limit": limit}
    record = {**about, **results}
    run = run_of(model.path) if keep else None
    if topology.rank == 0:
        print_table(
            table_console(),
            COLUMNS,
            _rows(record),
            title=record["checkpoint"],
            right_aligned=COLUMNS[2:],
        )
    run_on_all_ranks(partial(_write, record, output, run, topology.rank == 0))
    leave_process_group()


def _write(record: dict[str, Any], output: Path | None, run: Path | None, first: bool) -> None:
    """Write the results on rank 0: to the output file and to the run directory."""
    from megagrow.evaluation.results_store import keep, write
    from megagrow.evaluation.runner import average

    if first and output is not None:
        write(output, record)
    if first and run is not None:
        stored = keep(record, run, average)
        print_lines(table_console(), [f"results stored for the report of the run: {stored}"])


def _rows(record: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for task, metrics in record["results"].items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr")
                yield task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"
    if record["average"] is not None:
        yield "average", "acc_norm or acc", f"{record['average']:.4f}", ""
