"""Tables on terminals, in pipes and as Markdown."""

import io

import pytest
from rich.console import Console

from megagrow.common.tables import escape_markdown, markdown_table, print_table

COLUMNS, ROWS = ("name", "[b]"), [("[x]", "1"), ("long", "22")]


def printed(terminal: bool, **options: object) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=60, color_system=None)
    print_table(console, COLUMNS, ROWS, **options)
    return console.file.getvalue()


def test_pipe_shows_markdown_without_markup():
    lines = [line.strip() for line in printed(False, title="T").splitlines()]
    assert lines[0] == "T" and "| name | [b] |" in lines and "| [x]  | 1   |" in lines


def test_terminal_shows_borders():
    assert printed(True).startswith("\u256d") and "[x]" in printed(True)


def test_numbers_are_right_aligned():
    assert "|   1 |" in printed(False, right_aligned=["[b]"])


def test_markdown_table():
    table = markdown_table(COLUMNS, ROWS, right_aligned=["[b]"])
    assert table.splitlines() == [
        "| name | [b] |",
        "| --- | ---: |",
        "| [x] | 1 |",
        "| long | 22 |",
    ]


@pytest.mark.parametrize(("text", "escaped"), [("a | b", "a \\| b"), ("a\n<b>&", "a &lt;b>&amp;")])
def test_escape_markdown(text, escaped):
    assert escape_markdown(text) == escaped
