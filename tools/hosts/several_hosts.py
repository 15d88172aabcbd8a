"""Trains and grows a run on several hosts, takes hosts away from it, and slows their network.

    python tools/hosts/several_hosts.py | tee several-hosts.log

The hosts are made of Linux namespaces (hosts.py): needs root. Everything that the jobs print stands
in the log, and so does what was checked; the exit code is 1 if a check fails. See --help and
docs/results/several-hosts.md.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from tools.faults.run import look, write_corpus  # noqa: E402
from tools.hosts import ssh as hosts_ssh  # noqa: E402
from tools.hosts.job import (  # noqa: E402
    BASE_STEPS,
    HANG_TIMEOUT,
    STEPS,
    Ended,
    Job,
    furthest,
    losses,
    run_of,
)
from tools.hosts.namespaces import Host, Hosts, missing  # noqa: E402
from tools.hosts.speed import measure  # noqa: E402

TOLERANCE = 1e-5
"""Relative difference of losses that other sums of the same numbers may have."""
REACTION = 40.0
"""Seconds after hang_timeout in which a job has ended also on a busy machine. The ranks need 7 s; a
save in which they may be has 6 times the timeout; and the launchers leave last."""
SSH_REACTION = 60.0
"""Seconds in which ssh gives a host up that does not answer (launchers/deepspeed.sh)."""
SSH_LOST = 255
"""Its exit code then, which is that of the launcher too."""
SAVING = 30.0
"""Seconds that DeepSpeed leaves to ranks that were told to end."""
BLINK = 1.0
"""Seconds of an interruption that no job should mind; less than hang_timeout."""


def main(
    story: Annotated[bool, typer.Option(help="Hosts that are lost and come back.")] = True,
    speed: Annotated[bool, typer.Option(help="The table of slow networks.")] = True,
) -> None:
    """Try a run on several hosts, made of namespaces of this machine."""
    reason = missing()
    if reason is not None:
        print(f"error: several hosts on one machine: {reason}", file=sys.stderr)
        raise typer.Exit(2)
    with tempfile.TemporaryDirectory(prefix="megagrow-") as folder:
        corpus = Path(folder) / "corpus"
        write_corpus(corpus)
        try:
            if story:
                told = Story(Path(folder), corpus)
                two_hosts(told)
                four_hosts(told)
                by_ssh(told, Path(folder) / "doors")
            if speed:
                print("\n## How fast, on which network\n")
                measure(Path(folder), corpus)
        except AssertionError as failure:
            print(f"error: {failure}", file=sys.stderr)
            raise typer.Exit(1) from None


class Story:
    """Jobs one after the other, told as they go on. A check that fails raises AssertionError.

    `expected` has the losses of every step; without it, those of the first job that ends well.
    """

    def __init__(self, folder: Path, corpus: Path, expected: Sequence[float] = ()) -> None:
        self._folder, self._corpus, self._expected = folder, corpus, expected

    def start(
        self,
        name: str,
        hosts: Sequence[Host],
        slots: int,
        zero_stage: int = 2,
        doors: Path | None = None,
    ) -> Job:
        """Starts the run of a name, or goes on with it; by ssh where `doors` leads to one."""
        where = ", ".join(host.name for host in hosts)
        print(f"\n--- {name} on {where}, {slots} rank(s) each, ZeRO {zero_stage}", flush=True)
        run = run_of(self._corpus, self._folder / name, zero_stage)
        return Job(hosts, slots, run, doors)

    def whole(self, job: Job) -> None:
        """The job ends well, with the losses that are expected."""
        ended = job.finish()
        self._tell(ended)
        check(set(ended.codes.values()) == {0}, f"exit codes {ended.codes}")
        found = losses(job.output)
        if not self._expected:
            self._expected = found
            return
        apart = furthest(found, self._expected)
        check(apart <= TOLERANCE, f"losses of {STEPS} steps: at most {apart:.1e} apart (relative)")

    def lost(self, job: Job, hosts: Hosts, victim: Host, step: int, words: str) -> None:
        """A host loses its link in a step; the others say so in these words, all ends."""
        job.wait_for_step(step)
        print(f"(step {step} was seen: the link of {victim.name} goes down)", flush=True)
        hosts.cut(victim)
        ended = job.finish()
        self._tell(ended)
        others = {name: lines for name, lines in ended.said.items() if name != victim.name}
        errors = [line for lines in others.values() for line in lines if "error: " in line]
        check(bool(errors) and all(words in line for line in errors), f'"{words}" is told')
        code, more = (SSH_LOST, SSH_REACTION) if job.by_ssh else (4, 0.0)
        check(set(ended.codes.values()) == {code}, f"exit codes {ended.codes}")
        within = HANG_TIMEOUT + REACTION + more
        check(
            ended.seconds < within, f"all ended in {ended.seconds:.1f} s (timeout {HANG_TIMEOUT})"
        )
        nothing_left(hosts)

    def stopped(self, job: Job, hosts: Hosts, step: int) -> None:
        """Ctrl-C in a step: the run leaves with all that it has done."""
        job.wait_for_step(step)
        print(f"(step {step} was seen: Ctrl-C on {hosts[0].name})", flush=True)
        job.interrupt(hosts[0])
        ended = job.finish()
        self._tell(ended)
        check(ended.seconds < REACTION, f"ended in {ended.seconds:.1f} s, exit codes {ended.codes}")
        nothing_left(hosts, within=SAVING)
        seen = look(job.output)
        check(seen.finished == seen.step, f"saved after step {seen.step}, the last one")

    def _tell(self, ended: Ended) -> None:
        for name, lines in ended.said.items():
            for line in lines:
                print(f"{name}: {line.replace(str(self._folder), '...')}")


def check(held: bool, what: str) -> None:
    """Says what was checked; AssertionError if it is not so."""
    print(f"{'ok' if held else 'NOT SO'}: {what}", flush=True)
    if not held:
        raise AssertionError(what)


def nothing_left(hosts: Hosts, within: float = 0.0) -> None:
    """No rank and no launcher runs on any host, after so many seconds."""
    until = time.monotonic() + within
    while left := {host.name: words for host in hosts.hosts if (words := running(host))}:
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    check(not left, "no process is left on any host" + (f": {left}" if left else ""))


def running(host: Host) -> list[str]:
    """What runs on a host, but for its ssh server."""
    return [
        words
        for words in host.processes()
        if not words.startswith("sshd") and not words.endswith("<defunct>")
    ]


def two_hosts(story: Story) -> None:
    """Two hosts of two ranks: as one host; with either host lost, before and after a growth."""
    with Hosts(2) as hosts:
        first, second = hosts.hosts
        print("\n## The same run on one host and on two")
        story.whole(story.start("one-host", [first], 4))
        story.whole(story.start("two-hosts", [first, second], 2))

        print("\n## A host is lost after the growth, and comes back")
        job = story.start("comes-back", [first, second], 2)
        words = "host host1 (ranks 2, 3) is unresponsive: down or off the network"
        story.lost(job, hosts, second, BASE_STEPS + 4, words)
        hosts.mend(second)
        story.whole(story.start("comes-back", [first, second], 2))

        print("\n## The host of rank 0 is lost before the growth; the other goes on alone")
        job = story.start("goes-on-alone", [first, second], 2)
        words = "rank 0 on host0 does not answer: frozen or dead, or host0 or host1 is off"
        story.lost(job, hosts, first, BASE_STEPS - 6, words)
        story.whole(story.start("goes-on-alone", [second], 2))
        hosts.mend(first)

        print("\n## An interruption that is shorter than guards.hang_timeout")
        job = story.start("blink", [first, second], 2)
        job.wait_for_step(BASE_STEPS - 2)
        print(f"(the link of host1 is down for {BLINK} s)", flush=True)
        hosts.cut(second)
        time.sleep(BLINK)
        hosts.mend(second)
        story.whole(job)


def four_hosts(story: Story) -> None:
    """Four hosts of one rank, of which three go on."""
    with Hosts(4) as hosts:
        print("\n## Four hosts, of which one is lost; the run goes on with three")
        story.whole(story.start("four-hosts", hosts.hosts, 1, zero_stage=3))
        job = story.start("three-hosts", hosts.hosts, 1, zero_stage=3)
        words = "host host2 (rank 2) is unresponsive: down or off the network"
        story.lost(job, hosts, hosts[2], BASE_STEPS - 6, words)
        left = [host for host in hosts.hosts if host is not hosts[2]]
        story.whole(story.start("three-hosts", left, 1, zero_stage=3))


def by_ssh(story: Story, folder: Path) -> None:
    """Two hosts that launchers/deepspeed.sh reaches: a host is lost, and the user says stop."""
    print("\n## By launchers/deepspeed.sh, over ssh")
    reason = hosts_ssh.missing()
    if reason is not None:
        print(f"(left out: {reason})")
        return
    with Hosts(2) as hosts:
        first, second = hosts.hosts
        doors = hosts_ssh.open_doors(hosts.hosts, folder)
        job = story.start("by-ssh", [first, second], 2, doors=doors)
        words = "host host1 (ranks 2, 3) is unresponsive: down or off the network"
        story.lost(job, hosts, second, BASE_STEPS - 6, words)
        hosts.mend(second)
        job = story.start("by-ssh", [first, second], 2, doors=doors)
        story.stopped(job, hosts, BASE_STEPS + 4)
        story.whole(story.start("by-ssh", [first, second], 2, doors=doors))


if __name__ == "__main__":
    typer.run(main)
