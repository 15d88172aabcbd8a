"""Kills ranks of a run at random instants, starts it again, and checks that nothing was lost.

    python tools/faults/inject.py --kills 200 --seed 0 --ranks 2

A small run that grows is trained once undisturbed. Then the same run is killed, by SIGKILL of one
rank or of all, and started again by the same command, as a launcher would, until it ends; and so
on with new runs until the number of kills is reached. A kill is aimed at a phase: a start, a save,
the growth, or the steps between; its instant within it is drawn from the time that this phase took
when it was last seen, so that a busy machine moves no kill elsewhere. Ranks are forked from this
process, which has imported everything, so that a start costs no imports. What is seen of a run is
what anybody sees: the files that it writes. Exit code 1 if a run did not resume by itself, went on
from before its last finished checkpoint, lost that, or ended other than the undisturbed one.
"""

import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from tools.faults.run import (  # noqa: E402
    BASE_STEPS,
    INTERVAL,
    STEPS,
    Seen,
    differences,
    import_all,
    log_of,
    look,
    read_text,
    run_of,
    start_ranks,
    write_corpus,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.002
PATIENCE_SECONDS = 30.0
"""So long the ranks of a killed one may take to end by themselves."""
MEETING_SECONDS = 1.0
"""As long, where they had not met yet: there they wait for it, until their launcher ends them."""
HANG_SECONDS = 120.0
AIMS = ("steps", "steps", "start", "save", "save", "growth", "growth")
PHASES = ("start", "steps", "save", "growth")


@dataclass(frozen=True)
class Kill:
    """When, and whom."""

    aim: str
    """At which phase; a growth that is over already is taken as a save."""
    place: float
    """In [0, 1): of the saves or steps that are left, at which."""
    share: float
    """Of the time which the phase takes, from its beginning."""
    rank: int | None
    """None for all at once."""


@dataclass
class Report:
    """What came of all kills."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By phase, and by `one` rank or `all`."""
    runs: int = 0
    peers: Counter[str] = field(default_factory=Counter)
    """Ranks whose peer was killed: how they ended."""
    undone: list[int] = field(default_factory=list)
    """Steps that each kill cost."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def plan_kills(count: int, seed: int, ranks: int) -> list[Kill]:
    """As many kills as asked for; the same seed, the same ones."""
    draw = random.Random(seed)
    return [
        Kill(
            draw.choice(AIMS),
            draw.random(),
            draw.random(),
            draw.choice((None, draw.randrange(ranks))),
        )
        for _ in range(count)
    ]


class Injection:
    """Runs in a folder, their ranks, and what came of killing them."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder, self._ranks = folder, ranks
        self._expected = folder / "undisturbed"
        self._lasted: dict[str, float] = {}
        self.report = Report()
        write_corpus(folder / "train")

    def measure(self) -> None:
        """Trains the undisturbed run, and sees how long each phase takes."""
        self._attempt(self._expected, None)
        if self.report.failures:
            raise SystemExit(self.report.failures[0])
        told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._lasted.items())
        logger.info("undisturbed, as last seen: %s", told)

    def inject(self, kills: list[Kill]) -> None:
        """Kills one run after another until all kills are done; each is let end at last."""
        begin, waiting = time.monotonic(), list(kills)
        while waiting and not self.report.failures:
            self.report.runs += 1
            output = self._folder / f"run-{self.report.runs}"
            while waiting and self._attempt(output, waiting[0]):
                waiting.pop(0)
                if len(waiting) % 20 == 0:
                    logger.info("%d kills", len(kills) - len(waiting))
            if not waiting and not self.report.failures:
                self._attempt(output, None)
            self.report.failures += differences(output, self._expected)
        self.report.seconds = time.monotonic() - begin

    def _attempt(self, output: Path, kill: Kill | None) -> bool:
        """Starts a run and kills it; False if it came to its end before."""
        before, processes = look(output), self._start(output)
        phase = self._wait(output, before, kill, processes)
        if phase is None:
            self._join(processes)
            codes = [process.exitcode for process in processes]
            if codes != [0] * self._ranks:
                self._fail(output, f"ended with exit codes {codes}: {self._errors(output)}")
        else:
            assert kill is not None
            self._kill(processes, kill, phase)
            self.report.kills[phase, "all" if kill.rank is None else "one"] += 1
        self._check(output, before, look(output))
        return phase is not None and not self.report.failures

    def _wait(
        self, output: Path, before: Seen, kill: Kill | None, processes: list[Any]
    ) -> str | None:
        """Returns at the instant of a kill, with the phase; None when the run has ended."""
        begin = entered = time.monotonic()
        phase, saves, due = "start", 0, None
        while any(process.is_alive() for process in processes):
            seen, now = look(output), time.monotonic()
            current = seen.phase(len(before.starts))
            if current != phase:
                self._lasted[phase] = now - entered
                phase, entered = current, now
                saves += phase == "save"
            if kill and due is None and _reached(kill, before.finished, seen.step, phase, saves):
                due = now + kill.share * self._lasted.get(phase, 0.0)
            if due is not None and now >= due:
                return phase
            if now - begin > HANG_SECONDS:
                self._fail(output, f"hangs in {phase}: {self._errors(output)}")
                self._signal(processes)
            time.sleep(POLL_SECONDS)
        return None

    def _kill(self, processes: list[Any], kill: Kill, phase: str) -> None:
        """SIGKILL; the others may end by themselves, and are ended if they do not."""
        victims = processes if kill.rank is None else [processes[kill.rank]]
        self._signal(victims)
        peers = [process for process in processes if process not in victims]
        deadline = time.monotonic() + (MEETING_SECONDS if phase == "start" else PATIENCE_SECONDS)
        for process in peers:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in peers if process.is_alive()]
        self._signal(late)
        self._join(processes)
        waited = "ended, having waited to meet" if phase == "start" else "ended, having hung"
        self.report.peers += Counter({"by themselves": len(peers) - len(late), waited: len(late)})

    def _check(self, output: Path, before: Seen, after: Seen) -> None:
        """The start went on from where it had to, and no finished checkpoint is gone."""
        if len(after.starts) > len(before.starts):
            begun = after.starts[-1]
            self.report.undone.append(max(0, before.step - begun))
            if begun < before.finished:
                self._fail(output, f"went on from step {begun}, not from {before.finished}")
        if after.finished < before.finished:
            self._fail(output, f"lost the checkpoint of step {before.finished}")

    def _start(self, output: Path) -> list[Any]:
        path = output.with_suffix(".yaml")
        values = run_of(self._folder / "train", output, self._ranks)
        path.write_text(json.dumps(values), encoding="utf-8")
        return start_ranks(path, self._ranks)

    def _errors(self, output: Path) -> str:
        logs = [read_text(log_of(output, rank)) for rank in range(self._ranks)]
        return " | ".join(log[-600:] for log in logs)

    def _fail(self, output: Path, problem: str) -> None:
        self.report.failures.append(f"{output}: {problem}")

    @staticmethod
    def _signal(processes: list[Any]) -> None:
        for process in processes:
            process.kill()

    @staticmethod
    def _join(processes: list[Any]) -> None:
        for process in processes:
            process.join()


def _reached(kill: Kill, finished: int, step: int, phase: str, saves: int) -> bool:
    """Whether what a kill is aimed at has begun, in a start that goes on from step `finished`."""
    left = STEPS - finished
    aim = "save" if kill.aim == "growth" and finished > BASE_STEPS else kill.aim
    if aim == "start":
        return True
    if aim == "save":
        return saves > int(kill.place * (left // INTERVAL))
    return phase == aim and (aim == "growth" or step > finished + int(kill.place * left))


def fault_injection(
    kills: Annotated[int, typer.Option(help="How many.")] = 200,
    seed: Annotated[int, typer.Option(help="The same seed, the same plan of kills.")] = 0,
    ranks: Annotated[int, typer.Option(help="Of each run.")] = 2,
    folder: Annotated[Path | None, typer.Option(help="Where runs are kept; else removed.")] = None,
) -> None:
    """Kill a small run again and again; it has to end as if nothing had happened."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    import_all()
    with tempfile.TemporaryDirectory() as own:
        place = folder or Path(own)
        place.mkdir(parents=True, exist_ok=True)
        injection = Injection(place, ranks)
        injection.measure()
        injection.inject(plan_kills(kills, seed, ranks))
    show(injection.report)
    sys.exit(1 if injection.report.failures else 0)


def show(report: Report) -> None:
    """The table of kills by phase, and what they cost."""
    row = "{:<8}{:>10}{:>12}"
    print(row.format("phase", "one rank", "all ranks"))
    for phase in PHASES:
        print(row.format(phase, *(report.kills[phase, whom] for whom in ("one", "all"))))
    total = report.kills.total()
    print(
        f"{total} kills of {report.runs} runs in {report.seconds:.0f} s, "
        f"{report.seconds / max(1, total):.2f} s each; steps undone: "
        f"{sum(report.undone) / max(1, len(report.undone)):.1f} on average, at most "
        f"{max(report.undone, default=0)}\nranks whose peer was killed: "
        + ", ".join(f"{count} {how}" for how, count in sorted(report.peers.items()))
    )
    for failure in report.failures:
        print(f"failed: {failure}")


if __name__ == "__main__":
    typer.run(fault_injection)
