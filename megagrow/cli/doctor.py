"""`megagrow doctor`: check this machine, or with --cluster all ranks of a job."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from megagrow.cli.options import JsonOutput, Overrides
from megagrow.common.tables import print_json, stdout_to_stderr, table_console
from megagrow.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from megagrow.config.schema import RunConfig

WAIT_SECONDS = 60.0
"""Default timeout of ranks that wait for each other; imports from a shared disk are slow."""


def doctor(
    run_file: Annotated[
        Path | None, typer.Option("--run", help="Run file: show the backends of its stages.")
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Check all ranks; launch it like a training run.")
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="With --cluster: folder that all hosts must share.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="With --cluster: timeout in s; default: 60.")
    ] = None,
    as_json: JsonOutput = False,
) -> None:
    """Show the devices and packages of this machine and the kernel backends that `auto` selects."""
    if run_file is None and overrides:
        raise ConfigError("--set changes a key of a run file: give one with --run")
    if not cluster and (output_dir is not None or timeout is not None):
        raise ConfigError("--output-dir and --timeout need --cluster")
    from megagrow.config.load import load_run

    with stdout_to_stderr(as_json) as stdout:
        run = None if run_file is None else load_run(run_file, overrides or ())
        document = stdout if as_json else None
        if cluster:
            folder = run.output_dir if run is not None and output_dir is None else output_dir
            _examine_cluster(folder, timeout or WAIT_SECONDS, document)
        else:
            _examine_machine(run, document)


def _examine_machine(run: "RunConfig | None", document: TextIO | None) -> None:
    """Print the report of this machine, as JSON on `document` if it is given."""
    import torch

    from megagrow.doctor.local import examine_machine, local_document, print_local_report

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = examine_machine(run, device)
    if document is not None:
        print_json(local_document(report), document)
    else:
        print_local_report(report, table_console())


def _examine_cluster(folder: Path | None, seconds: float, document: TextIO | None) -> None:
    """Print the report of all ranks on rank 0; raise ResourceError on all if a problem is found.

    `document` is as in `_examine_machine`.
    """
    from megagrow.doctor.cluster import examine_cluster
    from megagrow.doctor.diagnostics import cluster_document, find_problems, print_cluster_report
    from megagrow.parallel.launch import read_launch

    launch = read_launch()
    report = examine_cluster(launch, folder, seconds)
    problems = find_problems(report)
    if launch.rank == 0 and document is not None:
        print_json(cluster_document(report, problems), document)
    elif launch.rank == 0:
        print_cluster_report(report, problems, table_console())
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ResourceError(f"the cluster has {count}: {problems[0]}")
