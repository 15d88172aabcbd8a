"""Watches what a loader does with a file: no code run, nothing outside opened, memory kept.

An audit hook of the interpreter sees every file that is opened and every process that is started.
It cannot be taken out again, so it is put in once and listens only while something is watched.
"""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from tests.helpers.fuzz.mutations import CANARY

RUNS_CODE = {
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen"),
    *("pickle.find_class", "socket.connect", "ctypes.dlopen"),
}
"""Audit events that no loader of a file has a reason for."""

MEMORY_BYTES = 2**30
"""Memory that a loader may request beyond what the process has."""


class Watch:
    """Events recorded while it was active."""

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            return
        if event in RUNS_CODE:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and CANARY in str(arguments[0]):
            self.seen.append(f"opened {arguments[0]!r:.200}")


@cache
def the_watch() -> Watch:
    """The one of this process."""
    return Watch()


def watched(action: Callable[[], Any]) -> Any:
    """The action's result; AssertionError if it did what it may not, MemoryError if it asks for
    far more memory than its input has bytes."""
    watch = the_watch()
    watch.seen = []
    try:
        with _bounded_memory():
            return action()
    finally:
        seen, watch.seen = watch.seen, None
        assert not seen, seen


@contextmanager
def _bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
