"""Benchmark the work of one rank in a job of 1,024 ranks, simulated on one machine.

    python tools/benchmarks/scale/ranks.py --output bench_ranks.md

Writes a Markdown table. See --help.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.markdown import Markdown
from torch.testing._internal.distributed.fake_pg import FakeStore

from megagrow.checkpoint import load, source
from megagrow.checkpoint.discovery import checkpoint_name, shard_name
from megagrow.checkpoint.load import load_storage, newest_valid_on_all_ranks
from megagrow.checkpoint.manifest import (
    Manifest,
    describe_layout,
    verify_checkpoint,
    write_manifest,
)
from megagrow.checkpoint.shards import shard_tensors, write_shard
from megagrow.common import checksums
from megagrow.common.tables import markdown_table
from megagrow.config.schema import ModelConfig, OptimizerConfig
from megagrow.formats.open_source import open_found
from megagrow.parallel.engine_config import parameter_groups
from megagrow.parallel.process_groups import make_topology
from megagrow.parallel.sharding import ADAMW_KINDS, Storage, parameter_plan
from megagrow.reshard.fill import fill_read
from megagrow.reshard.layout import Layout
from megagrow.train.fault_tolerance.heartbeat import HeartbeatServer
from megagrow.train.fault_tolerance.heartbeat_client import HeartbeatClient
from megagrow.train.fault_tolerance.heartbeat_endpoint import HeartbeatAddress, HeartbeatEndpoint

MODEL = ModelConfig(
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=12,
    num_attention_heads=16,
    vocab_size=8192,
)
"""46M parameters: a checkpoint of 530 MiB."""
TP = 8
BEAT_SECONDS = 0.5
"""Period of the heartbeats of a rank."""
TURNS = 25
"""Groups of ranks whose heartbeats are sent at the same time."""
MEASURED_PERIODS = 12

COLUMNS = ["work of one rank", "count", "MiB read", "time", "compare"]


def main(
    output: Annotated[Path, typer.Option(help="The Markdown file.")] = Path("bench_ranks.md"),
    ranks: Annotated[int, typer.Option(min=2 * TP, help="Simulated ranks.")] = 1024,
) -> None:
    """Measure the work of one rank of many: process groups, resume, initialization, heartbeats.

    The process group is torch's `fake` backend: collectives return at once. The last column has the
    work of a rank that creates every group, or that reads every file. Heartbeats arrive at the rate
    of a real job over one TCP connection per rank.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rows = [_heartbeats(ranks)]
    with tempfile.TemporaryDirectory() as folder, _fake_group(ranks):
        rows += [*_process_groups(ranks), *_resume(Path(folder), ranks)]
    table = markdown_table(COLUMNS, rows)
    output.write_text(table + "\n", encoding="utf-8")
    Console().print(Markdown(table))


@contextmanager
def _fake_group(ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _process_groups(ranks: int) -> Iterator[list[str]]:
    for name, tp in (("first", 1), ("first", TP), ("later", TP)):
        with _counted(dist, "new_group") as created:
            begin = time.perf_counter()
            make_topology(tp, torch.device("cpu"))
            milliseconds = 1000 * (time.perf_counter() - begin)
        work, groups = f"process groups: {name} topology of TP {tp}", f"{ranks // tp + tp:,} groups"
        yield [work, str(len(created)), "", f"{milliseconds:.2f} ms", groups]


def _resume(folder: Path, ranks: int) -> Iterator[list[str]]:
    layout = _layout(ranks)
    path = _write_checkpoint(folder / checkpoint_name(1), layout)
    begin = time.perf_counter()
    manifest = verify_checkpoint(path)
    seconds = time.perf_counter() - begin
    storage = _empty_storage(layout)
    files = f"{ranks:,} files"

    def load_all() -> None:
        load_storage(path, manifest, layout, storage)

    def initialize() -> None:
        fill_read(layout, 0, storage, ADAMW_KINDS, open_found(path).read)

    with _counted(checksums, "problem_of") as read:
        action = partial(newest_valid_on_all_ranks, folder)
        yield _row("verify a checkpoint", read, action, f"{files}, {1000 * seconds:.0f} ms")
    with _counted(load, "safe_open") as read:
        yield _row("load it (mapped)", read, load_all, files)
    with _counted(source, "read_header") as read:
        yield _row("initialize from it (`init_from`)", read, initialize, files)


def _row(work: str, files: list[Any], action: Callable[[], object], alone: str) -> list[str]:
    read, begin = _bytes_read(), time.perf_counter()
    action()
    seconds, read = time.perf_counter() - begin, _bytes_read() - read
    count, size = f"{len(files)}", f"{read / 2**20:.1f}"
    return [f"{work}: files", count, size, f"{1000 * seconds:.0f} ms", alone]


@contextmanager
def _counted(module: Any, name: str) -> Iterator[list[Any]]:
    """Record the first arguments of the calls of a function."""
    original, calls = getattr(module, name), list[Any]()

    def counting(first: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(first)
        return original(first, *arguments, **options)

    with mock.patch.object(module, name, counting):
        yield calls


def _bytes_read() -> int:
    """Return the bytes of all read calls of this process; mapped files are not included."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def _layout(ranks: int) -> Layout:
    plan = parameter_plan(MODEL, 1)
    groups = tuple(group.names for group in parameter_groups(plan, OptimizerConfig(lr=1e-4), {}))
    return Layout(plan, groups, zero_stage=1, dp=ranks, tp=1)


def _write_checkpoint(path: Path, layout: Layout) -> Path:
    path.mkdir()
    files = {}
    for rank in range(layout.dp):
        shapes = shard_tensors(layout, rank)
        tensors = {name: torch.zeros(stored.shape) for name, stored in shapes.items()}
        files[shard_name(rank)] = write_shard(path / shard_name(rank), tensors)
    write_manifest(path, Manifest(MODEL.model_dump(), describe_layout(layout), 1, {}, {}, files))
    return path


def _empty_storage(layout: Layout) -> Storage:
    held = {name: len(layout.interval(name, 0)) for name in layout.plan}
    return {
        name: {kind: torch.zeros(numel) for kind in ADAMW_KINDS}
        for name, numel in held.items()
        if numel
    }


def _heartbeats(ranks: int) -> list[str]:
    """Measure the CPU time of the heartbeat server on rank 0."""
    fork = multiprocessing.get_context("fork")
    addresses, ready, stop = fork.Queue(), fork.Event(), fork.Event()
    peers = fork.Process(target=_send_heartbeats, args=(addresses, ranks, ready, stop), daemon=True)
    peers.start()  # before this process has other threads
    server = HeartbeatServer(ranks, "host")
    endpoint = HeartbeatEndpoint(server, ranks, "127.0.0.1")
    addresses.put(HeartbeatAddress(("127.0.0.1",), endpoint.port, endpoint.token, "host"))
    ready.wait()
    begin, used = time.perf_counter(), time.process_time()
    time.sleep(MEASURED_PERIODS * BEAT_SECONDS)
    used, seconds = time.process_time() - used, time.perf_counter() - begin
    oldest = max(beat.age for beat in server.heartbeats().values())
    stop.set()
    peers.join()
    endpoint.close(announce=False)
    share = f"{100 * used / seconds:.1f}% of a core"
    age = f"oldest heartbeat: {oldest:.2f} s"
    return ["serve heartbeats on rank 0: connections", f"{ranks - 1:,}", "", share, age]


def _send_heartbeats(addresses: Any, ranks: int, ready: Any, stop: Any) -> None:
    """Send the heartbeats of all ranks but 0, in `TURNS` groups per period."""
    address = addresses.get()
    clients = [HeartbeatClient(address, rank, f"host{rank // 8}") for rank in range(1, ranks)]
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda client: client.report(0, 1, "step 1"), clients))
    links = [client._link for client in clients if client._link is not None]
    ready.set()
    number = 0
    while not stop.is_set():
        number += 1
        for turn in range(TURNS):
            begin = time.perf_counter()
            for link in links[turn::TURNS]:
                if number > 1:
                    link.recv(4096)  # the answer to the heartbeat before
                link.sendall(b'[%d, "report", %d, "step %d"]\n' % (number, number, number))
            time.sleep(max(0.0, BEAT_SECONDS / TURNS - (time.perf_counter() - begin)))


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[3])]
    typer.run(main)
