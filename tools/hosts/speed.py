"""Time of steps and growths between two hosts, on networks of several speeds."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.common.tables import markdown_table
from tools.faults.run import LENGTH, MODEL
from tools.hosts.job import BATCH, HostJob, records, run_of
from tools.hosts.namespaces import Host, Hosts

NETWORKS: tuple[tuple[str | None, float, int], ...] = (
    (None, 0.0, 1),
    ("1gbit", 0.001, 1),
    ("100mbit", 0.005, 1),
    ("100mbit", 0.05, 1),
    ("100mbit", 0.005, 2),
)
"""Send rate per host (notation of tc; None: no limit), additional round-trip time in seconds, and
ZeRO stage."""
WIDE = MODEL | {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
BASE_STEPS, STEPS = 5, 10
FIRST = 2
"""Warm-up steps of a stage, which are not counted."""

SERVER = "import socket\nwith socket.create_server(('', 5000)) as s:\n c, _ = s.accept()\n"
SERVER += " while d := c.recv(1): c.sendall(d)\n c, _ = s.accept()\n while c.recv(1 << 20): pass\n"
SERVER += " c.sendall(b'.')"
CLIENT = """
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
"""Programs of two hosts that measure the round-trip time and the throughput of one TCP stream."""


@dataclass(frozen=True)
class NetworkSpeed:
    """Measurements of a run on one network."""

    round_trip: float
    """Seconds, for one byte over TCP."""
    rate: float
    """Bytes/s of one TCP stream of 20 MB."""
    steps: tuple[float, float]
    """Median seconds per step before and after the growth."""
    growth: float
    """Seconds of the growth."""
    growth_bytes: int
    """Bytes between all ranks."""
    sent: float
    """Bytes that a host sends during the run."""


COLUMNS = (
    *("network", "round trip", "one stream", "ZeRO", "step, 4 layers", "step, 8 layers"),
    *("growth", "sent"),
)


def measure(folder: Path, corpus: Path) -> None:
    """Measure all networks and print the table."""
    rows = []
    for rate, round_trip, zero_stage in NETWORKS:
        speed = on_network(folder, corpus, rate, round_trip, zero_stage)
        network = f"{rate or 'unlimited'}, + {round_trip * 1e3:.0f} ms"
        row = [
            network,
            f"{speed.round_trip * 1e3:.2f} ms",
            f"{speed.rate * 8e-6:.0f} Mbit/s",
            str(zero_stage),
            *(f"{seconds:.2f} s" for seconds in speed.steps),
            f"{speed.growth:.2f} s",
            f"{speed.sent * 1e-6:.0f} MB",
        ]
        print(*row, sep=", ", flush=True)
        rows.append(row)
    print(markdown_table(COLUMNS, rows))
    moved = speed.growth_bytes * 1e-6
    print(f"\nThe growth transfers {moved:.1f} MB. Sent: by each host, during the run.")


def on_network(
    folder: Path, corpus: Path, rate: str | None, round_trip: float, zero_stage: int
) -> NetworkSpeed:
    """Train and grow a model of a few MB on two hosts of one rank each."""
    with Hosts(2, round_trip) as hosts:
        if rate is not None:
            hosts.limit(rate)
        latency, stream = probe(hosts[0], hosts[1])
        before = hosts.sent(hosts[0])
        output = folder / f"speed-{rate}-{round_trip}-{zero_stage}"
        job = HostJob(hosts.hosts, 1, wide_run(corpus, output, zero_stage))
        result = job.finish()
        if set(result.codes.values()) != {0}:
            raise AssertionError(result.output)
        sent = hosts.sent(hosts[0]) - before
    (growth,) = records(output, "growth")
    seconds = {r["step"]: 1 / r["tokens_per_second"] for r in records(output, "train")}
    parts = (range(FIRST + 1, BASE_STEPS + 1), range(BASE_STEPS + FIRST + 1, STEPS + 1))
    small, large = (
        statistics.median(seconds[step] for step in part) * BATCH * LENGTH for part in parts
    )
    moved = growth["bytes_between_ranks"]
    return NetworkSpeed(latency, stream, (small, large), growth["seconds"], moved, sent)


def probe(one: Host, other: Host) -> tuple[float, float]:
    """Return the round-trip time in seconds and the bytes/s of one stream between two hosts."""
    server = one.start("python3", "-c", SERVER)
    client = other.start("python3", "-c", CLIENT, stdout=-1)
    round_trip, rate = map(float, client.communicate(timeout=60)[0].split())
    server.wait(60)
    return round_trip, rate


def wide_run(corpus: Path, output: Path, zero_stage: int) -> dict[str, Any]:
    """Return a run with a model that grows from 3 to 6 million parameters."""
    tokens, deep = BATCH * LENGTH, WIDE | {"num_hidden_layers": 8}
    stages = [
        {"model": WIDE, "tokens": BASE_STEPS * tokens},
        {
            "model": deep,
            "tokens": (STEPS - BASE_STEPS) * tokens,
            "growth": {"operator": "direct_depth"},
        },
    ]
    changes = {"stages": stages, "guards": {}, "checkpoint": {"interval": 1000}}
    return run_of(corpus, output, zero_stage, **changes)
