"""Console output: tables, lines of text, and JSON documents.

Commands print text through this module only: names from files contain no markup here, and control
characters are escaped.
"""

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megagrow.common.json_text import format_json
from megagrow.errors import printable

STDOUT, STDERR = 1, 2
"""File descriptors of the standard streams."""

PIPED_WIDTH = 10_000
"""Console columns when the output is a file or a pipe: no line is wrapped."""


def escape_unencodable() -> None:
    """Let standard output escape characters that its encoding lacks, as standard error does.

    Under a locale such as ISO-8859-1, a generated text would otherwise end the run.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(OSError):  # the descriptor was a file and is now a pipe
            sys.stdout.reconfigure(errors="backslashreplace")


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


def print_json(document: Any, stream: TextIO | None = None) -> None:
    """Print a document as JSON on `stream`, by default standard output."""
    print(format_json(document), end="", flush=True, file=stream)


@contextmanager
def stdout_to_stderr(enabled: bool = True) -> Iterator[TextIO]:
    """Redirect standard output to standard error and yield the original stream for a document.

    Output of C++ libraries, such as gloo's connection messages, and of child processes is included.
    """
    stream = sys.stdout
    if not enabled:
        yield stream
        return
    with ExitStack() as stack:
        if _descriptors() == (STDOUT, STDERR):
            stream.flush()
            stream = stack.enter_context(os.fdopen(os.dup(STDOUT), "w", encoding="utf-8"))
            stack.callback(os.dup2, stream.fileno(), STDOUT)
            os.dup2(STDERR, STDOUT)
        stack.enter_context(redirect_stdout(sys.stderr))
        yield stream


def _descriptors() -> tuple[int, int] | None:
    """Return the file descriptors of the standard streams; None if they have none."""
    try:
        return sys.stdout.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError):
        return None


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
