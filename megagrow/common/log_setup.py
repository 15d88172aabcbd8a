"""Console output of the `megagrow` loggers: `TIME | [rank N |] [warning:] MESSAGE` on stdout.

Modules log through `logging.getLogger(__name__)`. Only the `megagrow` logger is configured here;
the loggers of DeepSpeed and other libraries are unchanged.
"""

import logging
from contextlib import suppress
from enum import StrEnum

from rich.console import Console
from rich.text import Text

from megagrow.errors import printable

_ROOT = "megagrow"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
"""Local time at the start of each line."""


class LogLevel(StrEnum):
    """Lowest severity that is printed."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class ConsoleHandler(logging.Handler):
    """Print records through a rich console, above its live display if one is active.

    A record that cannot be printed is dropped: a lost reader must not end a run
    (`lasting_output` redirects the standard streams before that).
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record as one line."""
        with suppress(OSError):
            self.console.print(Text(self.format(record)), soft_wrap=True)


class _Formatter(logging.Formatter):
    """Time, rank (only in runs of several ranks), severity from WARNING upwards, message."""

    def __init__(self, rank: int, world_size: int) -> None:
        where = f"rank {rank} | " if world_size > 1 else ""
        super().__init__(f"%(asctime)s | {where}%(message)s", TIME_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Escape the message and prefix it with its severity from WARNING upwards."""
        record.message = printable(record.message)
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname.lower()}: {record.message}"
        return super().formatMessage(record)


def configure_logging(
    level: str = LogLevel.INFO,
    rank: int = 0,
    world_size: int = 1,
    console: Console | None = None,
) -> ConsoleHandler:
    """Print the records of all megagrow modules on this rank; replaces an earlier configuration.

    Rank 0 prints from `level` upwards. The other ranks repeat most of its messages, so they print
    warnings and errors only, unless `level` is debug.

    Args:
        level: a `LogLevel`.
        console: the destination; stdout by default.
    """
    handler = ConsoleHandler(console or Console(highlight=False))
    handler.setFormatter(_Formatter(rank, world_size))
    lowest = logging.getLevelNamesMapping()[level.upper()]
    if rank > 0 and lowest > logging.DEBUG:
        lowest = max(lowest, logging.WARNING)
    root = logging.getLogger(_ROOT)
    root.handlers = [handler]
    root.setLevel(lowest)
    root.propagate = False  # a library that configures the root logger would print records twice
    return handler


def warn_once(logger: logging.Logger, key: str, message: str) -> None:
    """Log a warning, but only the first one of this process with the same key."""
    if key not in _warned:
        _warned.add(key)
        logger.warning("%s", message)


_warned: set[str] = set()
"""Keys of the warnings that `warn_once` has logged."""
