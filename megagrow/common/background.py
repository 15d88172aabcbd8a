"""Calls of functions in threads that end with the process."""

from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundCall(Thread, Generic[T]):
    """Call of a function in a daemon thread; its result or its error is kept until requested.

    `start` calls it in the thread, `run` in the foreground.
    """

    def __init__(self, function: Callable[[], T], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._function = function
        self._results: list[T] = []
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._results.append(self._function())
        except Exception as error:
            self._error = error

    def result(self) -> T:
        """Return the function's result once it is available; raises the function's error."""
        if self.is_alive():
            self.join()
        if self._error is not None:
            raise self._error
        return self._results[0]
