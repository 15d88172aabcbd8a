"""Notices that the ranks do not get on, and says which of them is missing.

Two threads of each rank, which go on while the main thread waits in a collective: one gives a sign
of life, the other ends the process if the main thread has stayed in one phase for too long. What a
rank does goes through the store in which the ranks found each other, over a connection of its own:
no collective, since those are what hangs.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from megagrow.errors import HANG_CODE

LONG = 6
"""How many times the timeout is granted to what may take long."""

TICK = 0.5
"""Seconds between two signs of life."""
SILENT_TICKS = 4
"""A rank that gives no sign in so many ticks is not alive."""
STORE_SECONDS = 10.0
"""The store has answered by then, or its host is gone."""
SPEAKING_SECONDS = 4.0
"""How long the others stay, so that the launcher does not end the one that speaks before it has."""


@dataclass(frozen=True)
class Sign:
    """What a rank tells of itself."""

    number: int
    """One more with each sign."""
    phases: int
    """Phases that its main thread has come to: all ranks come to the same ones."""
    phase: str
    leaves: bool
    """It ends since another rank is missing: it is not the one to look for."""


@dataclass(frozen=True)
class Verdict:
    """Who keeps the ranks from getting on."""

    missing: str
    """In words, with the ranks; empty if nobody is missing."""
    speaks: bool
    """Whether this rank is the one that says so."""


class Watchdog:
    """A context in which the ranks are watched; `timeout` in seconds, None for no limit.

    All ranks enter it together, each with a connection to the same torch.distributed store. `end`
    is how a process is ended.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        timeout: float | None,
        end: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._timeout, self._end = timeout, end
        self._phase, self._phases, self._long = "the start", 0, True
        self._number, self._leaves = 0, False
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=work.__name__, daemon=True)
            for work in (self._give_signs, self._watch)
        ]

    def __enter__(self) -> "Watchdog":
        self._give_sign()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def beat(self, phase: str, long: bool = False) -> None:
        """The main thread has come to the next phase, `long` if it may take its time."""
        self._phase, self._long = phase, long
        self._phases += 1

    def after_failure(self) -> Verdict:
        """Who is gone, where something that all ranks do together has failed; a few seconds."""
        self._leaves = True
        self._give_sign()
        return self._verdict(only_silent=True)

    def _give_sign(self) -> None:
        self._number += 1
        sign = [self._number, self._phases, self._phase, self._leaves]
        self._store.set(str(self._rank), json.dumps(sign))

    def _give_signs(self) -> None:
        # Where the store is gone with its host, collectives are going to fail and say more.
        with suppress(RuntimeError):
            while not self._over.wait(TICK):
                self._give_sign()

    def _watch(self) -> None:
        seen, waited, last = -1, 0.0, time.monotonic()
        while not self._over.wait(TICK):
            now = time.monotonic()
            # Time in which this process was stopped itself (a suspended job) is no waiting.
            waited, last = waited + min(now - last, 2 * TICK), now
            if self._phases != seen:
                seen, waited = self._phases, 0.0
            if self._timeout is not None and waited > self._timeout * (LONG if self._long else 1):
                self._end_all(waited)

    def _end_all(self, waited: float) -> None:
        verdict = self._verdict()
        if verdict.speaks:
            missing = verdict.missing or "no rank is missing, all of them wait"
            print(
                f"error: no progress in {self._phase} for {waited:.0f} s; {missing}; all ranks end "
                "(guards.hang_timeout)",
                file=sys.stderr,
                flush=True,
            )
        else:
            time.sleep(SPEAKING_SECONDS)
        self._end(HANG_CODE)

    def _verdict(self, only_silent: bool = False) -> Verdict:
        signs = self._two_signs()
        if signs is None:
            return Verdict("rank 0 is missing, or its machine: its store does not answer", True)
        earlier, later = signs
        ranks = range(self._world)
        silent = [r for r in ranks if later[r].number == earlier[r].number and not later[r].leaves]
        missing, why = silent, "gives no sign of life: it is frozen or dead"
        if not silent and not only_silent:
            first = min(sign.phases for sign in later)
            missing = [r for r in ranks if later[r].phases == first]
            why = "is alive, but stays behind"
            if len(missing) == self._world:
                missing = []
        told = "; ".join(f"rank {r} {why}, last in {later[r].phase}" for r in missing)
        alive = [r for r in ranks if r not in missing]
        return Verdict(told, self._rank == min(alive, default=self._rank))

    def _two_signs(self) -> tuple[list[Sign], list[Sign]] | None:
        """All ranks' signs, and those some ticks later; None if the store does not answer."""
        found: list[list[Sign]] = []

        def read() -> None:
            keys = [str(rank) for rank in range(self._world)]
            with suppress(RuntimeError):
                for pause in (0.0, SILENT_TICKS * TICK):
                    time.sleep(pause)
                    found.append([Sign(*json.loads(text)) for text in self._store.multi_get(keys)])

        # In a thread of its own: where the store's host is frozen a read never comes back.
        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        reading.join(STORE_SECONDS)
        return (found[0], found[1]) if len(found) == 2 else None
