"""Kill ranks of a run at random times, restart it, and check that no state is lost.

    python tools/faults/inject.py --kills 200 --seed 0 --ranks 2

A small run with stages of every kind is trained once without kills, as the reference. The same run
is then killed, by SIGKILL of one rank or of all ranks, and restarted with the same command until
it finishes. New runs follow until the number of kills is reached. Each kill targets a phase:
start, save, growth or steps. Its time within the phase is drawn from the last measured duration of
the phase, so that a slow machine does not shift it into another phase. Ranks are forked from this
process, which has imported all modules. The state of a run is read from its files only. The exit
code is 1 if a run does not resume, resumes from a step before its last finished checkpoint, loses
that checkpoint, or gives another result than the reference.
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
    RunSnapshot,
    differences,
    import_all,
    log_of,
    read_snapshot,
    read_text,
    run_of,
    start_ranks,
    write_corpora,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.002
EXIT_SECONDS = 30.0
"""Time limit for the peers of a killed rank to exit on their own."""
RENDEZVOUS_SECONDS = 1.0
"""The same during the rendezvous, where the peers wait until the launcher kills them."""
HANG_SECONDS = 120.0
TARGETS = ("steps", "steps", "start", "save", "save", "growth", "growth")
PHASES = ("start", "steps", "save", "growth")


@dataclass(frozen=True)
class PlannedKill:
    """Time and target of one kill."""

    phase: str
    """Phase to kill in; a save if this is `growth` and the growth is already done."""
    position: float
    """In [0, 1): selects one of the remaining saves or steps."""
    fraction: float
    """Time of the kill as a fraction of the duration of the phase."""
    rank: int | None
    """Rank to kill; None for all ranks."""


@dataclass
class InjectionReport:
    """Results of all kills."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(phase, `one` or `all` ranks) -> number of kills."""
    runs: int = 0
    peers: Counter[str] = field(default_factory=Counter)
    """Exit of the peers of a killed rank -> number of ranks."""
    lost_steps: list[int] = field(default_factory=list)
    """Steps that each restart repeats."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def plan_kills(count: int, seed: int, ranks: int) -> list[PlannedKill]:
    """Draw kills; the same seed gives the same kills."""
    draw = random.Random(seed)
    return [
        PlannedKill(
            draw.choice(TARGETS),
            draw.random(),
            draw.random(),
            draw.choice((None, draw.randrange(ranks))),
        )
        for _ in range(count)
    ]


class FaultInjection:
    """Starts runs in a folder, kills their ranks and collects the results."""

    def __init__(self, folder: Path, ranks: int, pipeline_ranks: int = 1) -> None:
        self._folder, self._ranks, self._pipeline_ranks = folder, ranks, pipeline_ranks
        self._expected = folder / "reference"
        self._durations: dict[str, float] = {}
        self.report = InjectionReport()
        write_corpora(folder / "train")

    def measure(self) -> None:
        """Train the reference run and measure the duration of each phase."""
        self._attempt(self._expected, None)
        if self.report.failures:
            raise SystemExit(self.report.failures[0])
        durations = (f"{name} {seconds:.2f} s" for name, seconds in self._durations.items())
        logger.info("phases of the reference run: %s", ", ".join(durations))

    def inject(self, kills: list[PlannedKill]) -> None:
        """Kill one run after another until all kills are done; the last one then finishes."""
        begin, remaining = time.monotonic(), list(kills)
        while remaining and not self.report.failures:
            self.report.runs += 1
            output = self._folder / f"run-{self.report.runs}"
            while remaining and self._attempt(output, remaining[0]):
                remaining.pop(0)
                if len(remaining) % 20 == 0:
                    logger.info("%d kills", len(kills) - len(remaining))
            if not remaining and not self.report.failures:
                self._attempt(output, None)
            self.report.failures += differences(output, self._expected)
        self.report.seconds = time.monotonic() - begin

    def _attempt(self, output: Path, kill: PlannedKill | None) -> bool:
        """Start a run and kill it; return False if it finished first."""
        before, processes = read_snapshot(output), self._start(output)
        phase = self._wait(output, before, kill, processes)
        if phase is None:
            self._join(processes)
            codes = [process.exitcode for process in processes]
            if codes != [0] * self._ranks:
                self._fail(output, f"exited with codes {codes}: {self._errors(output)}")
        else:
            assert kill is not None
            self._kill(processes, kill, phase)
            self.report.kills[phase, "all" if kill.rank is None else "one"] += 1
        self._check(output, before, read_snapshot(output))
        return phase is not None and not self.report.failures

    def _wait(
        self, output: Path, before: RunSnapshot, kill: PlannedKill | None, processes: list[Any]
    ) -> str | None:
        """Wait until the time of a kill and return the phase, or None if the run ends first."""
        begin = entered = time.monotonic()
        phase, saves, due = "start", 0, None
        while any(process.is_alive() for process in processes):
            snapshot, now = read_snapshot(output), time.monotonic()
            current = snapshot.phase(len(before.starts))
            if current != phase:
                self._durations[phase] = now - entered
                phase, entered = current, now
                saves += phase == "save"
            step, finished = snapshot.step, before.finished
            if kill and due is None and _reached(kill, finished, step, phase, saves):
                due = now + kill.fraction * self._durations.get(phase, 0.0)
            if due is not None and now >= due:
                return phase
            if now - begin > HANG_SECONDS:
                self._fail(output, f"hangs in {phase}: {self._errors(output)}")
                self._signal(processes)
            time.sleep(POLL_SECONDS)
        return None

    def _kill(self, processes: list[Any], kill: PlannedKill, phase: str) -> None:
        """Send SIGKILL to the target ranks, and to peers that do not exit in time."""
        victims = processes if kill.rank is None else [processes[kill.rank]]
        self._signal(victims)
        peers = [process for process in processes if process not in victims]
        deadline = time.monotonic() + (RENDEZVOUS_SECONDS if phase == "start" else EXIT_SECONDS)
        for process in peers:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in peers if process.is_alive()]
        self._signal(late)
        self._join(processes)
        killed = "killed during rendezvous" if phase == "start" else "killed after timeout"
        exits = {"exited on their own": len(peers) - len(late), killed: len(late)}
        self.report.peers += Counter(exits)

    def _check(self, output: Path, before: RunSnapshot, after: RunSnapshot) -> None:
        """Check that a start resumed from the last checkpoint and that no checkpoint is lost."""
        if len(after.starts) > len(before.starts):
            first = after.starts[-1]
            self.report.lost_steps.append(max(0, before.step - first))
            if first < before.finished:
                self._fail(output, f"resumed from step {first} instead of {before.finished}")
        if after.finished < before.finished:
            self._fail(output, f"lost the checkpoint of step {before.finished}")

    def _start(self, output: Path) -> list[Any]:
        path = output.with_suffix(".yaml")
        values = run_of(self._folder / "train", output, self._ranks, self._pipeline_ranks)
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


def _reached(kill: PlannedKill, finished: int, step: int, phase: str, saves: int) -> bool:
    """Return True if the target of a kill is reached, in a run resumed from step `finished`."""
    left = STEPS - finished
    target = "save" if kill.phase == "growth" and finished > BASE_STEPS else kill.phase
    if target == "start":
        return True
    if target == "save":
        return saves > int(kill.position * (left // INTERVAL))
    return phase == target and (target == "growth" or step > finished + int(kill.position * left))


def fault_injection(
    kills: Annotated[int, typer.Option(help="Number of kills.")] = 200,
    seed: Annotated[int, typer.Option(help="Random seed of the kills.")] = 0,
    ranks: Annotated[int, typer.Option(help="Ranks of each run.")] = 2,
    pipeline_ranks: Annotated[int, typer.Option(help="Of them, ranks of a pipeline.")] = 1,
    folder: Annotated[Path | None, typer.Option(help="Folder in which runs are kept.")] = None,
) -> None:
    """Kill a small run repeatedly and check that the result does not change."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    import_all()
    with tempfile.TemporaryDirectory() as temporary:
        path = folder or Path(temporary)
        path.mkdir(parents=True, exist_ok=True)
        injection = FaultInjection(path, ranks, pipeline_ranks)
        injection.measure()
        injection.inject(plan_kills(kills, seed, ranks))
    show(injection.report)
    sys.exit(1 if injection.report.failures else 0)


def show(report: InjectionReport) -> None:
    """Print the number of kills per phase and their cost."""
    row = "{:<8}{:>10}{:>12}"
    print(row.format("phase", "one rank", "all ranks"))
    for phase in PHASES:
        print(row.format(phase, *(report.kills[phase, count] for count in ("one", "all"))))
    total = report.kills.total()
    print(
        f"{total} kills of {report.runs} runs in {report.seconds:.0f} s, "
        f"{report.seconds / max(1, total):.2f} s each; repeated steps: "
        f"{sum(report.lost_steps) / max(1, len(report.lost_steps)):.1f} on average, maximum "
        f"{max(report.lost_steps, default=0)}\npeers of killed ranks: "
        + ", ".join(f"{count} {outcome}" for outcome, count in sorted(report.peers.items()))
    )
    for failure in report.failures:
        print(f"failed: {failure}")


if __name__ == "__main__":
    typer.run(fault_injection)
