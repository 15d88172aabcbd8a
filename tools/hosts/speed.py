"""How long steps and growths take between two hosts, on networks of several speeds."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.faults.run import LENGTH, MODEL
from tools.hosts.job import BATCH, Job, records, run_of
from tools.hosts.namespaces import Host, Hosts

NETWORKS: tuple[tuple[str | None, float, int], ...] = (
    (None, 0.0, 1),
    ("1gbit", 0.001, 1),
    ("100mbit", 0.005, 1),
    ("100mbit", 0.05, 1),
    ("100mbit", 0.005, 2),
)
"""What each host can send (tc's words; None: what the machine gives), the seconds by which a packet
and its answer take longer, and the ZeRO stage."""
WIDE = MODEL | {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
BASE_STEPS, STEPS = 5, 10
FIRST = 2
"""Steps of a stage that are not counted: they warm up."""

ANSWER = "import socket\nwith socket.create_server(('', 5000)) as s:\n c, _ = s.accept()\n"
ANSWER += " while d := c.recv(1): c.sendall(d)\n c, _ = s.accept()\n while c.recv(1 << 20): pass\n"
ANSWER += " c.sendall(b'.')"
ASK = """
import socket, time
def connect():
    for _ in range(100):
        try:
            return socket.create_connection(("host0", 5000))
        except OSError:
            time.sleep(0.05)
with connect() as c:
    c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    clock = time.perf_counter()
    for _ in range(20):
        c.sendall(b"."), c.recv(1)
    print((time.perf_counter() - clock) / 20)
with connect() as c:
    clock = time.perf_counter()
    c.sendall(bytes(20_000_000)), c.shutdown(socket.SHUT_WR), c.recv(1)
    print(20_000_000 / (time.perf_counter() - clock))
"""
"""Programs of two hosts that tell the seconds of a round trip, and the bytes/s of a stream."""


@dataclass(frozen=True)
class Speed:
    """What was measured on one network."""

    round_trip: float
    """Seconds, of one byte by TCP."""
    rate: float
    """Bytes/s of one TCP stream of 20 MB."""
    steps: tuple[float, float]
    """Seconds of a step, before and after the growth (medians)."""
    growth: float
    """Seconds."""
    growth_bytes: int
    """Between all ranks."""
    sent: float
    """Bytes that a host sends in the whole run."""


def measure(folder: Path, corpus: Path) -> None:
    """Prints the table."""
    print(
        "| network | round trip | one stream | ZeRO | step, 4 layers | step, 8 layers | growth "
        "| sent |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for rate, round_trip, zero_stage in NETWORKS:
        speed = on_network(folder, corpus, rate, round_trip, zero_stage)
        given = f"{rate or 'unlimited'}, + {round_trip * 1e3:.0f} ms"
        measured = f"{speed.round_trip * 1e3:.2f} ms | {speed.rate * 8e-6:.0f} Mbit/s"
        small, large = (f"{seconds:.2f} s" for seconds in speed.steps)
        took = f"{small} | {large} | {speed.growth:.2f} s | {speed.sent * 1e-6:.0f} MB"
        print(f"| {given} | {measured} | {zero_stage} | {took} |", flush=True)
    moved = speed.growth_bytes * 1e-6
    print(f"\nThe growth moves {moved:.1f} MB; sent: by each host, in the whole run.")


def on_network(
    folder: Path, corpus: Path, rate: str | None, round_trip: float, zero_stage: int
) -> Speed:
    """Trains and grows a run of some MB between two hosts of one rank each."""
    with Hosts(2, round_trip) as hosts:
        if rate is not None:
            hosts.limit(rate)
        answer, stream = probe(hosts[0], hosts[1])
        before = hosts.sent(hosts[0])
        output = folder / f"speed-{rate}-{round_trip}-{zero_stage}"
        job = Job(hosts.hosts, 1, wide_run(corpus, output, zero_stage))
        ended = job.finish()
        if set(ended.codes.values()) != {0}:
            raise AssertionError(ended.said)
        sent = hosts.sent(hosts[0]) - before
    (growth,) = records(output, "growth")
    seconds = {r["step"]: 1 / r["tokens_per_second"] for r in records(output, "train")}
    parts = (range(FIRST + 1, BASE_STEPS + 1), range(BASE_STEPS + FIRST + 1, STEPS + 1))
    small, large = (
        statistics.median(seconds[step] for step in part) * BATCH * LENGTH for part in parts
    )
    moved = growth["bytes_between_ranks"]
    return Speed(answer, stream, (small, large), growth["seconds"], moved, sent)


def probe(one: Host, other: Host) -> tuple[float, float]:
    """The seconds of a round trip between two hosts, and the bytes/s of one stream."""
    answer = one.start("python3", "-c", ANSWER)
    ask = other.start("python3", "-c", ASK, stdout=-1)
    round_trip, rate = map(float, ask.communicate(timeout=60)[0].split())
    answer.wait(60)
    return round_trip, rate


def wide_run(corpus: Path, output: Path, zero_stage: int) -> dict[str, Any]:
    """A model of 3 million parameters that grows to 6 million."""
    tokens, deep = BATCH * LENGTH, WIDE | {"num_hidden_layers": 8}
    stages = [
        {"model": WIDE, "tokens": BASE_STEPS * tokens},
        {
            "model": deep,
            "tokens": (STEPS - BASE_STEPS) * tokens,
            "growth": {"operator": "direct_depth"},
        },
    ]
    given = {"stages": stages, "guards": {}, "checkpoint": {"interval": 1000}}
    return run_of(corpus, output, zero_stage, **given)
