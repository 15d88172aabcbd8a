"""Runs a fuzzer's target on many inputs and counts what came of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from megagrow.errors import InputError
from tests.helpers.fuzz.mutations import CANARY
from tests.helpers.fuzz.watch import watched


@dataclass(frozen=True)
class Target:
    """A loader of files, and the files to try it on."""

    name: str
    inputs: st.SearchStrategy[Any]
    load: Callable[[Path, Any], None]
    """load(folder, input) writes the input into the folder, loads it, and asserts that what it got
    is what the input says. InputError is the one right way to refuse it."""


@dataclass
class Outcome:
    """Outcomes of all inputs of a target."""

    inputs: int = 0
    loads: int = 0
    refusals: int = 0
    slowest: float = 0.0
    """Seconds of the input that took longest."""
    failures: dict[str, str] = field(default_factory=dict)
    """By what went wrong and where: what was said, and the shortest input that led to it."""

    def add(self, target: Target, folder: Path, value: Any) -> None:
        """Tries one input."""
        begin = time.perf_counter()
        try:
            watched(lambda: target.load(folder, value))
            self.loads += 1
        except InputError:
            self.refusals += 1
        except Exception as error:
            self._fail(f"{type(error).__name__} at {_place(error)}", str(error), value)
        self.inputs += 1
        self.slowest = max(self.slowest, time.perf_counter() - begin)

    def _fail(self, problem: str, said: str, value: Any) -> None:
        shown, known = f"{said:.200} <- {value!r}", self.failures.get(problem)
        if known is None or len(shown) < len(known):
            self.failures[problem] = shown


def run(target: Target, examples: int, number: int, folder: Path) -> Outcome:
    """Tries a target on `examples` inputs; the same seed `number`, the same inputs."""
    outcome = Outcome()
    (folder.parent / CANARY).touch()

    @seed(number)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def attempt(value: Any) -> None:
        outcome.add(target, folder, value)

    attempt()
    return outcome


def _place(error: BaseException) -> str:
    """The file and line at which it was raised."""
    last = error.__traceback__
    assert last is not None
    while last.tb_next is not None:
        last = last.tb_next
    return f"{Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}"
