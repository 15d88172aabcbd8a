"""The command line about checkpoints: megagrow checkpoint ls | verify | show | prune."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megagrow.errors import ResourceError

checkpoint_app = typer.Typer(help="Look after checkpoints.", no_args_is_help=True)

PIPED_WIDTH = 200
"""Columns of what goes into a file or a pipe, which has no width of its own."""

Run = Annotated[
    Path,
    typer.Argument(help="A run directory, or a folder of checkpoints.", show_default=False),
]


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


@checkpoint_app.command("ls")
def list_all(run: Run) -> None:
    """List a run's checkpoints; sizes are compared, `verify` reads every byte."""
    from megagrow.checkpoint.discovery import list_checkpoints, step_of, unfinished
    from megagrow.checkpoint.listing import folder_of, glance, layout_text
    from megagrow.common.sizes import format_bytes

    folder = folder_of(run)
    table = Table("step", "stage", "tokens", "size", "layout", "protected", "state")
    for path in list_checkpoints(folder):
        seen = glance(path)
        place, layout, protected = ("?", "?"), "?", ""
        if seen.manifest is not None:
            counters = seen.manifest.run.get("counters", {})
            place = str(seen.manifest.run.get("stage")), f"{counters.get('tokens', 0):,}"
            layout, protected = layout_text(seen.manifest), escape(seen.manifest.protected or "")
        state = escape((seen.problem or "whole").replace(f"{path}/", "").replace(f"{path}: ", ""))
        size = format_bytes(seen.size)
        table.add_row(str(step_of(path)), *place, size, layout, protected, state)
    for path in unfinished(folder):
        table.add_row(path.stem.removeprefix("step-").lstrip("0"), *[""] * 5, "unfinished")
    _console().print(table)


@checkpoint_app.command()
def verify(
    paths: Annotated[
        list[Path], typer.Argument(help="Checkpoints or run directories.", show_default=False)
    ],
) -> None:
    """Read every byte of checkpoints; exit code 1 if anything is not as it was written."""
    from megagrow.checkpoint.listing import checkpoints_at, problems_of

    console, damaged = _console(), False
    for path in [found for given in paths for found in checkpoints_at(given)]:
        problems = problems_of(path)
        damaged |= bool(problems)
        for problem in problems or [f"{path}: whole"]:
            console.print(problem, markup=False, soft_wrap=True)
    if damaged:
        raise typer.Exit(1)


@checkpoint_app.command()
def show(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or a run for its newest.", show_default=False)
    ],
) -> None:
    """Show what a checkpoint is: model, layout, counters, growths, versions, files."""
    from megagrow.checkpoint.listing import checkpoints_at, summary

    table = Table.grid(padding=(0, 2))
    for topic, value in summary(checkpoints_at(checkpoint)[-1]).items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for number, (key, item) in enumerate(rows):
            table.add_row(topic if number == 0 else "", escape(str(key)), escape(str(item)))
    _console().print(table)


@checkpoint_app.command()
def prune(
    run: Run,
    keep_last: Annotated[int, typer.Option(min=1, help="So many of the newest whole ones stay.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Those whose step is a multiple stay.")
    ] = None,
    protected: Annotated[bool, typer.Option("--protected", help="Protected ones go too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove old checkpoints. The newest ones that stay are read whole first."""
    from megagrow.checkpoint.listing import folder_of
    from megagrow.checkpoint.manifest import verify_checkpoint
    from megagrow.checkpoint.retention import Retention, remove_checkpoint, superfluous

    console = _console()
    retention = Retention(keep_last, keep_every, not protected)
    for path in superfluous(folder_of(run), retention, verify_checkpoint):
        if not dry_run:
            try:
                remove_checkpoint(path)
            except OSError as error:
                raise ResourceError(f"{path}: cannot be removed ({error.strerror})") from error
        done = "would be removed" if dry_run else "removed"
        console.print(f"{path}: {done}", markup=False, soft_wrap=True)
