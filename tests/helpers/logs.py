"""Collects messages of the `megagrow` loggers, also in forked ranks, where caplog is missing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def captured_logs(level: int = logging.INFO) -> Iterator[list[str]]:
    """Collect the messages from `level` upwards, in order."""
    root, collector = logging.getLogger("megagrow"), _Collector()
    before = root.level
    collector.setLevel(level)
    root.addHandler(collector)
    root.setLevel(level)
    try:
        yield collector.messages
    finally:
        root.removeHandler(collector)
        root.setLevel(before)
