"""`megagrow doctor`: check this machine, or with --cluster all ranks of a job."""

from pathlib import Path
from typing import Annotated

import typer

from megagrow.cli.options import Overrides
from megagrow.common.tables import table_console
from megagrow.errors import ConfigError, ResourceError

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
) -> None:
    """Show the devices and packages of this machine and the kernel backends that `auto` selects."""
    from megagrow.config.load import load_run

    if run_file is None and overrides:
        raise ConfigError("--set changes a key of a run file: give one with --run")
    run = None if run_file is None else load_run(run_file, overrides or ())
    if cluster:
        folder = run.output_dir if run is not None and output_dir is None else output_dir
        _examine_cluster(folder, timeout or WAIT_SECONDS)
        return
    if output_dir is not None or timeout is not None:
        raise ConfigError("--output-dir and --timeout need --cluster")
    import torch

    from megagrow.doctor.local import print_local_report

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_local_report(run, device, table_console())


def _examine_cluster(folder: Path | None, seconds: float) -> None:
    """Print the report of all ranks on rank 0; raise ResourceError on all if a problem is found."""
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
