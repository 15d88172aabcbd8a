"""Train and grow a run on several hosts, disconnect hosts, and limit their network.

    python tools/hosts/several_hosts.py | tee several-hosts.log

The hosts are Linux namespaces (tools/hosts/namespaces.py), which needs root. Prints the output of
all jobs and the results of all checks; the exit code is 1 if a check fails. See --help and
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

from tools.faults.run import read_snapshot, write_corpora  # noqa: E402
from tools.hosts import ssh as hosts_ssh  # noqa: E402
from tools.hosts.job import (  # noqa: E402
    BASE_STEPS,
    HANG_TIMEOUT,
    STEPS,
    HostJob,
    JobResult,
    losses,
    relative_difference,
    run_of,
)
from tools.hosts.namespaces import Host, Hosts, unsupported_reason  # noqa: E402
from tools.hosts.speed import measure  # noqa: E402

TOLERANCE = 1e-5
"""Largest relative difference of losses from another order of summation."""
REACTION = 40.0
"""Seconds after hang_timeout until a job has ended, also on a busy machine. The ranks need 7 s; a
save has 6 times the timeout; the launchers exit last."""
SSH_REACTION = 60.0
"""Seconds until ssh gives up a host that does not respond (launchers/deepspeed.sh)."""
SSH_LOST = 255
"""Exit code of ssh in that case, and of the launcher."""
SAVING = 30.0
"""Seconds that DeepSpeed grants ranks to exit after a signal."""
BLINK = 1.0
"""Seconds of a harmless interruption; less than hang_timeout."""


def main(
    scenarios: Annotated[bool, typer.Option(help="Run the scenarios of lost hosts.")] = True,
    speed: Annotated[bool, typer.Option(help="Measure slow networks.")] = True,
) -> None:
    """Test a run on several hosts, which are namespaces of this machine."""
    reason = unsupported_reason()
    if reason is not None:
        print(f"error: several hosts on one machine: {reason}", file=sys.stderr)
        raise typer.Exit(2)
    with tempfile.TemporaryDirectory(prefix="megagrow-") as folder:
        corpus = Path(folder) / "corpus"
        write_corpora(corpus)
        try:
            if scenarios:
                story = HostScenario(Path(folder), corpus)
                two_hosts(story)
                four_hosts(story)
                by_ssh(story, Path(folder) / "ssh")
            if speed:
                print("\n## Speed by network\n")
                measure(Path(folder), corpus)
        except AssertionError as failure:
            print(f"error: {failure}", file=sys.stderr)
            raise typer.Exit(1) from None


class HostScenario:
    """Runs jobs one after another and prints their output and all checks.

    A failed check raises AssertionError. `expected` contains the loss of each step; the default is
    the losses of the first successful job.
    """

    def __init__(self, folder: Path, corpus: Path, expected: Sequence[float] = ()) -> None:
        self._folder, self._corpus, self._expected = folder, corpus, expected

    def start(
        self,
        name: str,
        hosts: Sequence[Host],
        slots: int,
        zero_stage: int = 2,
        ssh_folder: Path | None = None,
    ) -> HostJob:
        """Start or resume the run of a name; over ssh if `ssh_folder` contains a client."""
        names = ", ".join(host.name for host in hosts)
        print(f"\n--- {name} on {names}, {slots} rank(s) each, ZeRO {zero_stage}", flush=True)
        run = run_of(self._corpus, self._folder / name, zero_stage)
        return HostJob(hosts, slots, run, ssh_folder)

    def completes(self, job: HostJob) -> None:
        """Check that a job succeeds with the expected losses."""
        result = job.finish()
        self._print(result)
        check(set(result.codes.values()) == {0}, f"exit codes {result.codes}")
        actual = losses(job.output)
        if not self._expected:
            self._expected = actual
            return
        difference = relative_difference(actual, self._expected)
        text = f"losses of {STEPS} steps: largest relative difference {difference:.1e}"
        check(difference <= TOLERANCE, text)

    def lost(self, job: HostJob, hosts: Hosts, victim: Host, step: int, words: str) -> None:
        """Disconnect a host after a step; check that all others report `words` and exit."""
        job.wait_for_step(step)
        print(f"(step {step} is recorded: disconnecting {victim.name})", flush=True)
        hosts.disconnect(victim)
        result = job.finish()
        self._print(result)
        others = {name: lines for name, lines in result.output.items() if name != victim.name}
        errors = [line for lines in others.values() for line in lines if "error: " in line]
        check(bool(errors) and all(words in line for line in errors), f'"{words}" is reported')
        code, extra = (SSH_LOST, SSH_REACTION) if job.by_ssh else (4, 0.0)
        check(set(result.codes.values()) == {code}, f"exit codes {result.codes}")
        within = HANG_TIMEOUT + REACTION + extra
        text = f"all exited after {result.seconds:.1f} s (timeout {HANG_TIMEOUT})"
        check(result.seconds < within, text)
        nothing_left(hosts)

    def is_interrupted(self, job: HostJob, hosts: Hosts, step: int) -> None:
        """Send Ctrl-C after a step; check that the run saves all steps and exits."""
        job.wait_for_step(step)
        print(f"(step {step} is recorded: Ctrl-C on {hosts[0].name})", flush=True)
        job.interrupt(hosts[0])
        result = job.finish()
        self._print(result)
        text = f"exited after {result.seconds:.1f} s, exit codes {result.codes}"
        check(result.seconds < REACTION, text)
        nothing_left(hosts, within=SAVING)
        snapshot = read_snapshot(job.output)
        check(snapshot.finished == snapshot.step, f"saved after the last step, {snapshot.step}")

    def _print(self, result: JobResult) -> None:
        for name, lines in result.output.items():
            for line in lines:
                print(f"{name}: {line.replace(str(self._folder), '...')}")


def check(is_true: bool, text: str) -> None:
    """Print a check. Raises AssertionError if it failed."""
    print(f"{'ok' if is_true else 'FAILED'}: {text}", flush=True)
    if not is_true:
        raise AssertionError(text)


def nothing_left(hosts: Hosts, within: float = 0.0) -> None:
    """Check that no rank and no launcher is left on any host after `within` seconds."""
    deadline = time.monotonic() + within
    while left := {host.name: lines for host in hosts.hosts if (lines := running(host))}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    check(not left, "no process is left on any host" + (f": {left}" if left else ""))


def running(host: Host) -> list[str]:
    """Return the command lines on a host, without its ssh server."""
    return [
        line
        for line in host.processes()
        if not line.startswith("sshd") and not line.endswith("<defunct>")
    ]


def two_hosts(story: HostScenario) -> None:
    """Two hosts of two ranks: compared with one host; loss of either host, around a growth."""
    with Hosts(2) as hosts:
        first, second = hosts.hosts
        print("\n## The same run on one host and on two")
        story.completes(story.start("one-host", [first], 4))
        story.completes(story.start("two-hosts", [first, second], 2))

        print("\n## A host is lost after the growth and reconnects")
        job = story.start("reconnects", [first, second], 2)
        words = "host host1 (ranks 2, 3) is unresponsive: down or off the network"
        story.lost(job, hosts, second, BASE_STEPS + 4, words)
        hosts.reconnect(second)
        story.completes(story.start("reconnects", [first, second], 2))

        print("\n## The host of rank 0 is lost before the growth; resume on the other host")
        job = story.start("one-host-left", [first, second], 2)
        words = "rank 0 on host0 does not answer: frozen or dead, or host0 or host1 is off"
        story.lost(job, hosts, first, BASE_STEPS - 6, words)
        story.completes(story.start("one-host-left", [second], 2))
        hosts.reconnect(first)

        print("\n## An interruption shorter than guards.hang_timeout")
        job = story.start("blink", [first, second], 2)
        job.wait_for_step(BASE_STEPS - 2)
        print(f"(the link of host1 is down for {BLINK} s)", flush=True)
        hosts.disconnect(second)
        time.sleep(BLINK)
        hosts.reconnect(second)
        story.completes(job)


def four_hosts(story: HostScenario) -> None:
    """Four hosts of one rank; one is lost and the run resumes on three."""
    with Hosts(4) as hosts:
        print("\n## One of four hosts is lost; the run resumes on three")
        story.completes(story.start("four-hosts", hosts.hosts, 1, zero_stage=3))
        job = story.start("three-hosts", hosts.hosts, 1, zero_stage=3)
        words = "host host2 (rank 2) is unresponsive: down or off the network"
        story.lost(job, hosts, hosts[2], BASE_STEPS - 6, words)
        left = [host for host in hosts.hosts if host is not hosts[2]]
        story.completes(story.start("three-hosts", left, 1, zero_stage=3))


def by_ssh(story: HostScenario, folder: Path) -> None:
    """Two hosts started by launchers/deepspeed.sh: loss of a host, and Ctrl-C."""
    print("\n## launchers/deepspeed.sh over ssh")
    reason = hosts_ssh.unavailable_reason()
    if reason is not None:
        print(f"(skipped: {reason})")
        return
    with Hosts(2) as hosts:
        first, second = hosts.hosts
        ssh_folder = hosts_ssh.start_servers(hosts.hosts, folder)
        job = story.start("by-ssh", [first, second], 2, ssh_folder=ssh_folder)
        words = "host host1 (ranks 2, 3) is unresponsive: down or off the network"
        story.lost(job, hosts, second, BASE_STEPS - 6, words)
        hosts.reconnect(second)
        job = story.start("by-ssh", [first, second], 2, ssh_folder=ssh_folder)
        story.is_interrupted(job, hosts, BASE_STEPS + 4)
        story.completes(story.start("by-ssh", [first, second], 2, ssh_folder=ssh_folder))


if __name__ == "__main__":
    typer.run(main)
