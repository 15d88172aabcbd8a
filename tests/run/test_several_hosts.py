"""Two emulated hosts: loss of a host after a growth, and resuming on the other host."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.jobs import train
from tools.faults.run import write_corpora
from tools.hosts.job import BASE_STEPS, INTERVAL, losses, records, run_of
from tools.hosts.namespaces import Hosts, unsupported_reason
from tools.hosts.several_hosts import HostScenario
from tools.hosts.speed import probe

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CREATOR = """
import time
from tools.hosts.namespaces import Hosts
with Hosts(1) as hosts:
    sleeping = hosts[0].start("sleep", 600)
    print(hosts[0].init_pid, sleeping.pid, sep="\\n", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True, scope="module")
def requirements() -> None:
    reason = unsupported_reason()
    if reason is not None:
        pytest.skip(f"hosts cannot be created: {reason}")


@pytest.fixture
def pair() -> Iterator[Hosts]:
    with Hosts(2) as hosts:
        yield hosts


def losses_of_one_rank(folder: Path, corpus: Path) -> list[float]:
    path = folder / "one-rank.yaml"
    path.write_text(yaml.safe_dump(run_of(corpus, folder / "one-rank")), encoding="utf-8")
    done = train(path, 1).finish()
    assert done.codes == [0], done.err
    return losses(folder / "one-rank")


@pytest.mark.timeout(900)  # two jobs with launchers; slow on a busy machine
def test_a_run_resumes_on_one_host_after_the_loss_of_the_other(tmp_path: Path, pair: Hosts) -> None:
    corpus, (first, second) = tmp_path / "corpus", pair.hosts
    write_corpora(corpus)
    story = HostScenario(tmp_path, corpus, losses_of_one_rank(tmp_path, corpus))
    job = story.start("lost", [first, second], 1)
    words = "host host1 (rank 1) is unresponsive: down or off the network (last heartbeat: "
    story.lost(job, pair, second, BASE_STEPS + 4, words)
    (start,), (growth,) = records(job.output, "start"), records(job.output, "growth")
    assert (start["step"], growth["step"]) == (0, BASE_STEPS)
    story.completes(story.start("lost", [first], 1))
    restarted = records(job.output, "start")[-1]["step"]
    assert restarted > BASE_STEPS and restarted % INTERVAL == 0


def test_each_host_has_its_own_name_and_processes(pair: Hosts) -> None:
    program = "import os, socket; print(os.getpid(), socket.gethostname())"
    started = [host.start(sys.executable, "-c", program, stdout=-1) for host in pair.hosts]
    printed = [process.communicate(timeout=30)[0].split() for process in started]
    assert [name for _, name in printed] == ["host0", "host1"]
    assert all(int(process) < 20 for process, _ in printed)


def test_the_network_has_the_requested_rate_and_latency() -> None:
    with Hosts(2, round_trip=0.02) as hosts:
        hosts.limit("100mbit")
        round_trip, rate = probe(hosts[0], hosts[1])
    assert 0.02 <= round_trip < 0.06
    assert 50e6 < rate * 8 < 105e6


def test_hosts_of_a_killed_program_are_removed() -> None:
    creator = subprocess.Popen(
        [sys.executable, "-c", CREATOR], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert creator.stdout is not None
    names = [creator.stdout.readline().strip() for _ in range(2)]
    assert all(name.isdecimal() and Path("/proc", name).exists() for name in names)
    creator.kill()
    creator.wait()
    deadline = time.monotonic() + 20
    while any(Path("/proc", name).exists() for name in names) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path("/proc", name).exists() for name in names)


def test_hosts_are_removed() -> None:
    with Hosts(2) as hosts:
        sleeping = hosts[1].start("sleep", 600)
        assert hosts[1].processes() == ["sleep 600"]
        init = Path(f"/proc/{hosts[1].init_pid}")
        assert init.exists()
    assert sleeping.wait(10) != 0
    assert not init.exists()
