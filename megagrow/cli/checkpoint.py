"""`megagrow checkpoint`: list, verify, show and prune checkpoints."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from megagrow.cli.options import CheckpointPath, JsonOutput, RunDirectory, count, existing_paths
from megagrow.common.tables import (
    print_facts,
    print_json,
    print_lines,
    print_table,
    stdout_to_stderr,
    table_console,
)
from megagrow.errors import CheckpointError, ResourceError

checkpoint_app = typer.Typer(help="Manage checkpoints.", no_args_is_help=True)

COLUMNS = ("step", "stage", "tokens", "size", "layout", "protected", "state")


@checkpoint_app.command("ls")
def list_all(run: RunDirectory, as_json: JsonOutput = False) -> None:
    """List a run's checkpoints. Only file sizes are compared; `verify` reads every byte."""
    from megagrow.checkpoint.listing import folder_of, list_entries

    entries = list_entries(folder_of(run))
    if as_json:
        print_json({"checkpoints": entries})
    else:
        print_table(table_console(), COLUMNS, map(_row, entries))


def _row(entry: dict[str, Any]) -> Sequence[str]:
    """Return the cells of a checkpoint; its path is left out of its problem."""
    from megagrow.common.sizes import format_bytes
    from megagrow.config.stage import format_layout

    step, path, problem = str(entry["step"]), entry["path"], entry["problem"]
    if entry["layout"] is None:
        facts = ["" if problem is None else "?"] * 4
    else:
        size, layout = format_bytes(entry["bytes"]), format_layout(**entry["layout"])
        facts = [str(entry["stage"]), f"{entry['tokens']:,}", size, layout]
    state = (problem or entry["state"]).replace(f"{path}/", "").replace(f"{path}: ", "")
    return step, *facts, entry["protected"] or "", state


@checkpoint_app.command()
def verify(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Checkpoints or run directories.", show_default=False, callback=existing_paths
        ),
    ],
    as_json: JsonOutput = False,
) -> None:
    """Read every byte of checkpoints; exit code 1 if any file differs from its checksum."""
    from megagrow.checkpoint.listing import checkpoints_at, problems_of

    entries = []
    with stdout_to_stderr(as_json):
        for checkpoint in [checkpoint for path in paths for checkpoint in checkpoints_at(path)]:
            problems = problems_of(checkpoint)
            entries.append({"path": str(checkpoint), "problems": problems})
            if not as_json:
                print_lines(table_console(), problems or [f"{checkpoint}: valid"])
    valid = not any(entry["problems"] for entry in entries)
    if as_json:
        print_json({"valid": valid, "checkpoints": entries})
    if not valid:
        raise typer.Exit(1)


@checkpoint_app.command()
def show(
    checkpoint: CheckpointPath,
    as_json: JsonOutput = False,
) -> None:
    """Show the model, layout, counters, growths, versions and files of a checkpoint."""
    from megagrow.checkpoint.listing import checkpoints_at, contents, summary

    path = checkpoints_at(checkpoint)[-1]
    if as_json:
        print_json(contents(path))
        return
    facts = []
    for topic, value in summary(path).items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for number, (key, item) in enumerate(rows):
            facts.append((topic if number == 0 else "", str(key), _shown(item)))
    print_facts(table_console(), facts)


def _shown(value: Any) -> str:
    """Return a value as in a run file."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


@checkpoint_app.command()
def prune(
    run: RunDirectory,
    keep_last: Annotated[
        int, typer.Option(min=1, help="Number of most recent valid checkpoints to keep.")
    ],
    keep_every: Annotated[
        int | None,
        typer.Option(parser=count, help="Also keep steps that are a multiple of this."),
    ] = None,
    include_protected: Annotated[
        bool, typer.Option("--include-protected", help="Remove protected checkpoints too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the checkpoints to remove.")
    ] = False,
) -> None:
    """Remove old checkpoints. The newest ones to keep are verified first."""
    from megagrow.checkpoint.listing import folder_of, problems_of
    from megagrow.checkpoint.removal import remove_checkpoint
    from megagrow.checkpoint.retention import Retention, superfluous

    retention, failed = Retention(keep_last, keep_every, not include_protected), 0
    paths = superfluous(folder_of(run), retention, cache(lambda path: not problems_of(path)))
    if not paths:
        print_lines(table_console(), ["nothing to remove"])
    for path in paths:
        done = "would be removed" if dry_run else "removed"
        if not dry_run:
            try:
                remove_checkpoint(path)
            except (OSError, CheckpointError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                done, failed = f"cannot be removed ({reason})", failed + 1
        print_lines(table_console(), [f"{path}: {done}"])
    if failed:
        raise ResourceError(f"{failed} checkpoints cannot be removed, see above")
