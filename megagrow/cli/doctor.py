"""The command line's `megagrow doctor`: this machine, or with --cluster the ranks of a job."""

from pathlib import Path
from typing import Annotated

import typer

from megagrow.common.tables import Overrides, table_console
from megagrow.errors import ConfigError, ResourceError

WAIT_SECONDS = 60.0
"""How long ranks wait for each other, by default: imports from a shared disk take a while."""


def doctor(
    run_file: Annotated[
        Path | None, typer.Option("--run", help="A run file: what its stages would take.")
    ] = None,
    overrides: Overrides = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Look at all ranks; start it as a run is started.")
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="With --cluster: a folder that all hosts must share.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="With --cluster: seconds of a wait; default: 60.")
    ] = None,
) -> None:
    """Say what this machine has, which kernels it can run, and what `auto` takes."""
    from megagrow.config.load import load_run

    if run_file is None and overrides:
        raise ConfigError("--set changes a key of a run file: give one with --run")
    run = None if run_file is None else load_run(run_file, overrides or ())
    if cluster:
        folder = run.output_dir if run is not None and output_dir is None else output_dir
        _examine_cluster(folder, timeout or WAIT_SECONDS)
        return
    if output_dir is not None or timeout is not None:
        raise ConfigError("--output-dir and --timeout go with --cluster")
    import torch

    from megagrow.doctor.local import print_local_report

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_local_report(run, device, table_console())


def _examine_cluster(folder: Path | None, seconds: float) -> None:
    """Print the report on rank 0; raise ConfigError on all ranks if there are problems."""
    from megagrow.doctor.cluster import examine_cluster
    from megagrow.doctor.diagnostics import find_problems, print_cluster_report
    from megagrow.parallel.launch import read_launch

    launch = read_launch()
    report = examine_cluster(launch, folder, seconds)
    problems = find_problems(report)
    if launch.rank == 0:
        print_cluster_report(report, problems, table_console())
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ResourceError(f"the cluster has {count}: {problems[0]}")
