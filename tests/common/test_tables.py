"""Tables on terminals, in pipes and as Markdown."""

import ast
import io
import subprocess
import sys

import pytest
from rich.console import Console

from megagrow.common.tables import (
    escape_markdown,
    markdown_table,
    print_facts,
    print_lines,
    print_table,
    table_console,
)
from tests.helpers.source_tree import dotted, files, imports, name_of, tree_of

COLUMNS, ROWS = ("name", "[b]"), [("[x]", "1"), ("long", "22")]


def printed(terminal: bool, **options: object) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=60, color_system=None)
    print_table(console, COLUMNS, ROWS, **options)
    return console.file.getvalue()


def test_a_document_is_alone_on_stdout_whatever_else_writes_there() -> None:
    program = """
import os, subprocess, sys
from megagrow.common.tables import print_json, stdout_to_stderr
print("before")
with stdout_to_stderr() as stdout:
    print("python")
    os.write(1, b"descriptor\\n")
    subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    print_json({"loss": float("nan")}, stdout)
print("after")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == 'before\n{\n  "loss": null\n}\nafter\n'
    assert set(done.stderr.split()) == {"python", "descriptor", "child"}


def test_pipe_shows_markdown_without_markup():
    lines = [line.strip() for line in printed(False, title="T").splitlines()]
    assert lines[0] == "T" and "| name | [b] |" in lines and "| [x]  | 1   |" in lines


def test_text_from_files_neither_styles_nor_moves_the_cursor():
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system="standard")
    foreign = "x[/b][red]\x1b[2J\n\u202e"
    print_lines(console, [foreign])
    print_facts(console, [("name", foreign)])
    print_table(console, [foreign], [[foreign]], title=foreign)
    out = console.file.getvalue()
    assert out.count(r"x[/b][red]\x1b[2J\n\u202e") == 5
    assert "\x1b[2J" not in out and "\u202e" not in out


def test_no_line_of_a_pipe_is_wrapped(capsys):
    print_table(table_console(), COLUMNS, [("word " * 100, "1")])
    rows = capsys.readouterr().out.splitlines()
    assert sum("word" in row for row in rows) == 1
    print_lines(table_console(), ["word " * 100])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_commands_print_to_one_kind_of_console():
    """A console without a width wraps at 80 columns in a pipe; log lines are not wrapped."""
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in files("megagrow")
        if name_of(path) not in ("megagrow/common/tables.py", "megagrow/common/log_setup.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and dotted(node.func) == "Console"
        and not any(keyword.arg == "quiet" for keyword in node.keywords)
    ]
    assert found == []


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


def test_no_other_module_prints_unescaped_text():
    """A name from a file could contain markup, which raises an error, or control characters."""
    doors = ("megagrow/common/tables.py", "megagrow/common/log_setup.py")
    rich = ("rich.print", "rich.markup.escape", "rich.table.Table", "rich.text.Text")
    found = []
    for path in (path for path in files("megagrow") if name_of(path) not in doors):
        found += [f"{name_of(path)}: imports {name}" for name in imports(path) if name in rich]
        calls = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))
        found += [
            f"{name_of(path)}:{call.lineno}: {dotted(call.func)}"
            for call in calls
            if dotted(call.func).endswith("onsole.print")
        ]
    assert found == []
