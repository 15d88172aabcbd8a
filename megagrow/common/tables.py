"""What several commands of the command line share: arguments, and where their tables go."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

RunFile = Annotated[Path, typer.Argument(help="The run file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key: --set optimizer.lr=1e-3."),
]

PIPED_WIDTH = 200
"""Columns of a table that goes into a file or a pipe, which has no width of its own."""


def table_console() -> Console:
    """Where tables are printed."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
