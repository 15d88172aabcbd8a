"""Exit code and output of the command line for each class of error."""

import errno
import os
import sys
from pathlib import Path

import pytest

import megagrow.cli.app
from megagrow.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Diverged,
    InputError,
    ResourceError,
    RunError,
    unwritable,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (DataError, 2),
        (CheckpointError, 2),
        (ResourceError, 2),
        (RunError, 1),
        (Diverged, 3),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(
    error: type[InputError] | type[RunError],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(**options: object) -> None:
        raise error("some.key = 3 is too large; use 2")

    monkeypatch.setattr(megagrow.cli.app, "app", failing)
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    with pytest.raises(SystemExit) as end:
        megagrow.cli.app.main()
    assert end.value.code == code
    assert capsys.readouterr() == ("", "error: some.key = 3 is too large; use 2\n")
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR", "torch prints no stack traces"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, " (No space left on device); free disk space"),
        (errno.EROFS, " (Read-only file system); fix the permissions"),
        (errno.EMFILE, " (Too many open files); raise the limit of open files (ulimit -n)"),
        (errno.EIO, " (Input/output error)"),
    ],
)
def test_the_fix_of_a_failed_write_fits_its_cause(number: int, words: str) -> None:
    error = unwritable(Path("metrics.jsonl"), OSError(number, os.strerror(number)))
    assert str(error) == f"metrics.jsonl: cannot be written{words}"


LONG = "x" * 400


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", LONG, "--output", "out"],
        ["checkpoint", "ls", LONG],
        ["checkpoint", "verify", "/".join(["d"] * 2500)],
        ["convert", "reshard", LONG, "out"],
        ["convert", "megatron-import", LONG, "out"],
        ["convert", "universal-import", LONG, "out"],
        ["plan", LONG],
        ["prepare", LONG, "--output", "out", "--tokenizer", "train"],
        ["prepare", "/etc/hostname", "--output", "out", "--tokenizer", f"{LONG}.json"],
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`Path.is_file` raises OSError for it."""
    monkeypatch.setattr(sys, "argv", ["megagrow", *arguments])
    with pytest.raises(SystemExit) as end:
        megagrow.cli.app.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "File name too long" in said
