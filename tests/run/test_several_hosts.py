"""Two hosts of Linux namespaces: a grown run, a host that is lost, and the other that goes on."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.jobs import train
from tools.faults.run import write_corpus
from tools.hosts.job import BASE_STEPS, INTERVAL, losses, records, run_of
from tools.hosts.namespaces import Hosts, missing
from tools.hosts.several_hosts import Story
from tools.hosts.speed import probe

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
MAKER = """
import time
from tools.hosts.namespaces import Hosts
with Hosts(1) as hosts:
    sleeping = hosts[0].start("sleep", 600)
    print(hosts[0].first, sleeping.pid, sep="\\n", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True, scope="module")
def possible() -> None:
    reason = missing()
    if reason is not None:
        pytest.skip(f"hosts cannot be made of namespaces here: {reason}")


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


@pytest.mark.timeout(900)  # two jobs by launchers: on a busy machine all of that is slow
def test_a_host_is_lost_and_the_other_goes_on_alone(tmp_path: Path, pair: Hosts) -> None:
    corpus, (first, second) = tmp_path / "corpus", pair.hosts
    write_corpus(corpus)
    story = Story(tmp_path, corpus, losses_of_one_rank(tmp_path, corpus))
    job = story.start("lost", [first, second], 1)
    words = "host host1 (rank 1) is unresponsive: down or off the network (last heartbeat: "
    story.lost(job, pair, second, BASE_STEPS + 4, words)
    (start,), (growth,) = records(job.output, "start"), records(job.output, "growth")
    assert (start["step"], growth["step"]) == (0, BASE_STEPS)
    story.whole(story.start("lost", [first], 1))
    restarted = records(job.output, "start")[-1]["step"]
    assert restarted > BASE_STEPS and restarted % INTERVAL == 0


def test_each_host_has_its_own_name_and_processes(pair: Hosts) -> None:
    program = "import os, socket; print(os.getpid(), socket.gethostname())"
    said = [host.start(sys.executable, "-c", program, stdout=-1) for host in pair.hosts]
    found = [process.communicate(timeout=30)[0].split() for process in said]
    assert [name for _, name in found] == ["host0", "host1"]
    assert all(int(process) < 20 for process, _ in found)


def test_a_network_is_as_slow_as_was_said() -> None:
    with Hosts(2, round_trip=0.02) as hosts:
        hosts.limit("100mbit")
        round_trip, rate = probe(hosts[0], hosts[1])
    assert 0.02 <= round_trip < 0.06
    assert 50e6 < rate * 8 < 105e6


def test_nothing_is_left_of_the_hosts_of_a_program_that_was_killed() -> None:
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert maker.stdout is not None
    names = [maker.stdout.readline().strip() for _ in range(2)]
    assert all(name.isdecimal() and Path("/proc", name).exists() for name in names)
    maker.kill()
    maker.wait()
    until = time.monotonic() + 20
    while any(Path("/proc", name).exists() for name in names) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path("/proc", name).exists() for name in names)


def test_nothing_is_left_of_the_hosts() -> None:
    with Hosts(2) as hosts:
        sleeping = hosts[1].start("sleep", 600)
        assert hosts[1].processes() == ["sleep 600"]
        first = Path(f"/proc/{hosts[1].first}")
        assert first.exists()
    assert sleeping.wait(10) != 0
    assert not first.exists()
