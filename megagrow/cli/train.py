"""`megagrow train`: a training run, or a dry run of one rank."""

from typing import Annotated

import typer

from megagrow.cli.options import Overrides, RunFile
from megagrow.common.lasting_output import log_file, make_output_last
from megagrow.common.log_setup import LogLevel
from megagrow.common.tables import table_console
from megagrow.errors import ConfigError


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Build one rank and print its plan; train nothing."),
    ] = False,
    world: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: number of ranks; default: 1.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="With --dry-run: rank to build; default: 0.")
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Resume although KEY, or a key below it, contradicts the checkpoint; repeatable; "
            "`all` allows every key.",
        ),
    ] = None,
    stop_code: Annotated[
        int, typer.Option(min=0, max=125, help="Exit code after a stop by a signal.")
    ] = 0,
    log_level: Annotated[
        LogLevel,
        typer.Option(help="Lowest severity printed by rank 0; other ranks print warnings."),
    ] = LogLevel.INFO,
) -> None:
    """Train a run, growth included; resumes from its newest checkpoint."""
    from megagrow.config.load import load_run
    from megagrow.parallel.launch import read_launch

    if dry_run:
        from megagrow.planning.dry_run import dry_run as build_dry_run
        from megagrow.planning.dry_run_tables import print_dry_run

        result = build_dry_run(
            load_run(run_file, overrides or ()), world or 1, rank or 0, allow_change or ()
        )
        print_dry_run(result, table_console())
        count = len(result.problems)
        if count:
            problems = "1 problem" if count == 1 else f"{count} problems"
            raise ConfigError(f"the run would not start: {problems}, see above")
        return
    if world is not None or rank is not None:
        raise ConfigError("--world and --rank need --dry-run; the launcher sets them in a real run")
    run = load_run(run_file, overrides or ())
    make_output_last(log_file(run.output_dir, read_launch().rank))
    from megagrow.run import train as train_run  # its libraries keep references to the streams

    if train_run(run, log_level, allow_change or ()) is not None:
        raise typer.Exit(stop_code)
