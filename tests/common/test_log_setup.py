"""Console output of the package's loggers."""

import errno
import logging
from io import StringIO

import pytest
from rich.console import Console

from megagrow.common.log_setup import LogLevel, configure_logging

pytestmark = pytest.mark.usefixtures("restored_logging")

logger = logging.getLogger("megagrow.test")


def lines(rank: int, world_size: int, level: str = LogLevel.INFO) -> list[str]:
    """Log one message of each severity; return the lines without their time."""
    out = StringIO()
    configure_logging(level, rank, world_size, Console(file=out, width=40))
    logger.debug("a detail")
    logger.info("step %d | a message [1/2] that is longer than the console is wide", 7)
    logger.warning("a problem")
    return [line.split(" | ", 1)[1] for line in out.getvalue().splitlines()]


def test_time_comes_first_and_long_lines_are_not_wrapped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging()
    logger.info("x" * 300)
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 1
    assert captured.out.endswith(" | " + "x" * 300 + "\n")


def test_one_process_prints_no_rank() -> None:
    assert lines(0, 1) == [
        "step 7 | a message [1/2] that is longer than the console is wide",
        "warning: a problem",
    ]


def test_other_ranks_print_warnings_with_their_rank() -> None:
    assert lines(0, 2)[1] == "rank 0 | warning: a problem"
    assert lines(1, 2) == ["rank 1 | warning: a problem"]


def test_levels() -> None:
    assert lines(0, 2, "warning") == ["rank 0 | warning: a problem"]
    assert lines(1, 2, "error") == []
    assert len(lines(1, 2, "debug")) == 3


def test_other_loggers_are_left_alone() -> None:
    root, library = logging.getLogger(), logging.getLogger("DeepSpeed")
    before = [*root.handlers], root.level, [*library.handlers], library.level
    configure_logging("debug")
    assert ([*root.handlers], root.level, [*library.handlers], library.level) == before


def test_a_failed_write_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = configure_logging(console=Console(file=StringIO()))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(handler.console, "print", full)
        logger.info("lost")
    logger.info("printed")
    assert handler.console.file.getvalue().endswith(" | printed\n")
