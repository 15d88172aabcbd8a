"""What is wrong with a cluster, from what its ranks have said and measured. Pure."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from megagrow.common.sizes import format_in
from megagrow.common.tables import print_lines, print_table
from megagrow.doctor.network import Speeds
from megagrow.doctor.rank_report import RankReport
from megagrow.doctor.shared_folder import FolderView

K = TypeVar("K")

CLOCK_SECONDS = 0.5
"""Clocks may be so far apart; those that a time server sets are within milliseconds."""

SLOW = 0.7
"""A host whose network has less than this share of the median is named."""

SLOW_GPU = 0.85
"""The same of a GPU's matrix products."""

FREE_MEMORY = 0.9
"""A GPU of which less is free is used by somebody else."""

ENOUGH = 3
"""Hosts, or GPUs, that it takes to say which one is odd."""


@dataclass(frozen=True)
class ClusterReport:
    """All that is known, by rank."""

    reports: Sequence[RankReport]
    clocks: Sequence[float] = ()
    """Seconds by which each rank's clock is ahead of rank 0's."""
    folder: str | None = None
    views: Sequence[FolderView] = ()
    speeds: Sequence[Speeds] = ()

    @property
    def hosts(self) -> dict[str, list[int]]:
        """The ranks of each host, hosts in the order of their first ranks."""
        found: dict[str, list[int]] = {}
        for report in self.reports:
            found.setdefault(report.host, []).append(report.rank)
        return found

    def host_speeds(self) -> dict[str, float]:
        """Bytes per second of a rank of each host with the best of its partners; empty on one
        host."""
        found = {
            host: [max(self.speeds[rank].hosts) for rank in ranks if self.speeds[rank].hosts]
            for host, ranks in self.hosts.items()
            if self.speeds
        }
        return {host: median(speeds) for host, speeds in found.items() if speeds}


def findings(cluster: ClusterReport) -> list[str]:
    """All that is wrong, each in one line that names hosts or ranks."""
    return [
        *_different(cluster),
        *_clocks(cluster),
        *_folder(cluster),
        *_devices(cluster),
        *_slow_hosts(cluster),
        *_slow_gpus(cluster),
    ]


def _different(cluster: ClusterReport) -> Iterator[str]:
    """Values that are not the same everywhere: those that most have are taken as right."""
    tables: list[tuple[str, Callable[[RankReport], Mapping[str, str]]]] = [
        ("version of", lambda report: report.versions),
        ("variable", lambda report: report.variables),
    ]
    for what, table in tables:
        names = {name: None for report in cluster.reports for name in table(report)}
        for name in names:
            values = [table(report).get(name, "not set") for report in cluster.reports]
            yield from _odd(cluster, f"{what} {name}", values)
    devices = [report.device for report in cluster.reports]
    yield from _odd(cluster, "device", devices)


def _odd(cluster: ClusterReport, what: str, values: Sequence[str]) -> Iterator[str]:
    usual = Counter(values).most_common(1)[0][0]
    for value in dict.fromkeys(values):
        if value != usual:
            ranks = [rank for rank, own in enumerate(values) if own == value]
            yield f"{_where(cluster, ranks)}: {what} is {value}, elsewhere {usual}"


def _clocks(cluster: ClusterReport) -> Iterator[str]:
    for host, ranks in cluster.hosts.items():
        offsets = [cluster.clocks[rank] for rank in ranks] if cluster.clocks else []
        worst = max(offsets, key=abs, default=0.0)
        if abs(worst) > CLOCK_SECONDS:
            side = "ahead of" if worst > 0 else "behind"
            yield f"{host}: its clock is {abs(worst):.1f} s {side} that of rank 0's host"


def _folder(cluster: ClusterReport) -> Iterator[str]:
    for rank, view in enumerate(cluster.views):
        here = cluster.reports[rank].host
        if view.trouble is not None:
            yield f"{here}: {cluster.folder} cannot be written to ({view.trouble})"
        if view.unseen:
            others = ", ".join(cluster.reports[other].host for other in view.unseen)
            yield f"{here}: {cluster.folder} does not show what {others} has written there"


def _devices(cluster: ClusterReport) -> Iterator[str]:
    users: dict[str, list[int]] = {}
    for report in cluster.reports:
        where = f"{report.host}, rank {report.rank}"
        gpu = report.gpu
        if report.trouble is not None:
            yield f"{where}: its device fails: {report.trouble}"
        if gpu is None:
            continue
        users.setdefault(gpu.uuid, []).append(report.rank)
        if gpu.free < FREE_MEMORY * gpu.memory:
            free, memory = format_in(gpu.free, "GiB", 0), format_in(gpu.memory, "GiB", 0)
            yield f"{where}: of its GPU's {memory} GiB only {free} are free"
        if gpu.ecc_errors:
            yield f"{where}: its GPU has {gpu.ecc_errors} memory errors that were not corrected"
    for uuid, ranks in users.items():
        if len(ranks) > 1:
            yield f"{_where(cluster, ranks)}: they share one GPU ({uuid})"


def _slow_hosts(cluster: ClusterReport) -> Iterator[str]:
    speeds = cluster.host_speeds()
    for host, usual in _slow(speeds, SLOW):
        yield (
            f"{host}: its network does {speeds[host] / 1e9:.2f} GB/s for each rank, that of the "
            f"median host {usual / 1e9:.2f}"
        )


def _slow_gpus(cluster: ClusterReport) -> Iterator[str]:
    speeds = {r.rank: r.gpu.teraflops for r in cluster.reports if r.gpu is not None}
    for rank, usual in _slow(speeds, SLOW_GPU):
        yield (
            f"{cluster.reports[rank].host}, rank {rank}: its GPU does {speeds[rank]:.0f} TFLOP/s, "
            f"the median GPU {usual:.0f}"
        )


def _slow(speeds: Mapping[K, float], share: float) -> Iterator[tuple[K, float]]:
    """Who is below a share of the median, and the median; nobody among few."""
    if len(speeds) < ENOUGH:
        return
    usual = median(speeds.values())
    yield from ((who, usual) for who, speed in speeds.items() if speed < share * usual)


def _where(cluster: ClusterReport, ranks: Sequence[int]) -> str:
    """The hosts, where all of their ranks are meant; else also the ranks."""
    hosts = cluster.hosts
    meant = {cluster.reports[rank].host: None for rank in ranks}
    whole = sum(len(hosts[host]) for host in meant) == len(ranks)
    said = ", ".join(meant)
    return said if whole else f"{said}, {_ranks(ranks)}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


HOST_COLUMNS = (
    *("host", "ranks", "devices", "clock, ms", "GB/s a rank"),
    *("matmul, TFLOP/s", "free memory, GiB"),
)
SPEED_COLUMNS = ("MB on each rank", "all-reduce, GB/s", "all-to-all, GB/s")


def show_cluster(cluster: ClusterReport, wrong: Sequence[str], console: Console) -> None:
    """Prints tables, as Markdown where the output is no terminal, and a line for each finding."""
    versions = cluster.reports[0].versions
    said = ", ".join(f"{name} {value}" for name, value in versions.items())
    world = len(cluster.reports)
    console.print(Text(f"{world} ranks on {len(cluster.hosts)} hosts. Rank 0 has {said}"))
    print_table(console, HOST_COLUMNS, _host_rows(cluster))
    if cluster.speeds:
        print_table(console, SPEED_COLUMNS, _speed_rows(cluster))
    print_lines(console, (f"Wrong: {line}" for line in wrong))


def _host_rows(cluster: ClusterReport) -> Iterable[Sequence[str]]:
    network = cluster.host_speeds()
    for host, ranks in cluster.hosts.items():
        reports = [cluster.reports[rank] for rank in ranks]
        gpus = [report.gpu for report in reports if report.gpu is not None]
        devices = dict.fromkeys(report.device for report in reports)
        clock = max((cluster.clocks[rank] for rank in ranks), key=abs)
        yield (
            host,
            f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]),
            f"{len(reports)} x {', '.join(devices)}",
            f"{1000 * clock:+.1f}",
            f"{network[host] / 1e9:.2f}" if host in network else "",
            f"{min(gpu.teraflops for gpu in gpus):.0f}" if gpus else "",
            format_in(min(gpu.free for gpu in gpus), "GiB", 0) if gpus else "",
        )


def _speed_rows(cluster: ClusterReport) -> Iterable[Sequence[str]]:
    """Of all ranks together: the median of what they have measured."""
    for size in cluster.speeds[0].all_reduce:
        reduced = median(speeds.all_reduce[size] for speeds in cluster.speeds)
        exchanged = median(speeds.all_to_all[size] for speeds in cluster.speeds)
        yield f"{size / 2**20:g}", f"{reduced / 1e9:.2f}", f"{exchanged / 1e9:.2f}"
