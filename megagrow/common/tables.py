"""Console output and Markdown tables.

Commands print text through this module only: names from files contain no markup here, and control
characters are escaped.
"""

import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megagrow.errors import printable

PIPED_WIDTH = 10_000
"""Console columns when the output is a file or a pipe: no line is wrapped."""


def table_console() -> Console:
    """Return the console for standard output."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    right_aligned: Sequence[str] = (),
) -> None:
    """Print a table of plain text: with borders on a terminal, else as Markdown.

    `right_aligned` lists the names of the columns of numbers.
    """
    style = box.ROUNDED if console.is_terminal else box.MARKDOWN
    heading = None if title is None else Text(printable(title), style="table.title")
    table = Table(title=heading, title_justify="left", box=style)
    for column in columns:
        table.add_column(
            Text(printable(column)), justify="right" if column in right_aligned else "left"
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def print_facts(console: Console, rows: Iterable[Sequence[str]]) -> None:
    """Print rows of plain text in columns, without borders or a heading."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print each text on one line: no markup, no wrapping."""
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)


def markdown_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right_aligned: Sequence[str] = ()
) -> str:
    """Return a Markdown table; `escape_markdown` makes a cell of any text."""
    rule = ["---:" if column in right_aligned else "---" for column in columns]
    lines = [columns, rule, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escape_markdown(text: str) -> str:
    """Return printable text on one line that cannot end a table cell or begin an HTML tag."""
    joined = printable(" ".join(text.split()))
    return joined.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
