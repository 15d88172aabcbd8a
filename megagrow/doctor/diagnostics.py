"""Find problems of a cluster in the reports and measurements of its ranks. Pure functions."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeVar

from rich.console import Console

from megagrow.common.sizes import format_in
from megagrow.common.tables import print_lines, print_table
from megagrow.doctor.network import Speeds
from megagrow.doctor.rank_report import RankReport
from megagrow.doctor.shared_folder import FolderView

K = TypeVar("K")

MAX_CLOCK_OFFSET_SECONDS = 0.5
"""Largest accepted clock offset; clocks set by a time server agree within milliseconds."""

MIN_NETWORK_SHARE = 0.7
"""Smallest accepted network bandwidth of a host, relative to the median."""

MIN_GPU_SHARE = 0.85
"""Smallest accepted matmul throughput of a GPU, relative to the median."""

MIN_FREE_SHARE = 0.9
"""Free fraction of GPU memory below which the GPU counts as used by another process."""

MIN_FOR_OUTLIER = 3
"""Minimum number of hosts or GPUs to identify a slow one."""


@dataclass(frozen=True)
class ClusterReport:
    """Results of all checks; sequences are indexed by rank."""

    reports: Sequence[RankReport]
    clocks: Sequence[float] = ()
    """Seconds by which each rank's clock is ahead of rank 0's."""
    folder: str | None = None
    views: Sequence[FolderView] = ()
    speeds: Sequence[Speeds] = ()

    @property
    def hosts(self) -> dict[str, list[int]]:
        """Ranks of each host, in the order of the hosts' first ranks."""
        hosts: dict[str, list[int]] = {}
        for report in self.reports:
            hosts.setdefault(report.host, []).append(report.rank)
        return hosts

    def host_speeds(self) -> dict[str, float]:
        """Return the network bandwidth of each host in bytes per second; empty for a single host.

        It is the median over the host's ranks of the speed with the fastest partner.
        """
        best = {
            host: [max(self.speeds[rank].hosts) for rank in ranks if self.speeds[rank].hosts]
            for host, ranks in self.hosts.items()
            if self.speeds
        }
        return {host: median(speeds) for host, speeds in best.items() if speeds}


def find_problems(cluster: ClusterReport) -> list[str]:
    """Return all problems, each as one line that names hosts or ranks."""
    return [
        *_mismatches(cluster),
        *_clock_problems(cluster),
        *_folder_problems(cluster),
        *_device_problems(cluster),
        *_slow_hosts(cluster),
        *_slow_gpus(cluster),
    ]


def _mismatches(cluster: ClusterReport) -> Iterator[str]:
    """Report values that differ between ranks; the most common value counts as correct."""
    tables: list[tuple[str, Callable[[RankReport], Mapping[str, str]]]] = [
        ("version of", lambda report: report.versions),
        ("variable", lambda report: report.variables),
    ]
    for kind, table in tables:
        names = {name: None for report in cluster.reports for name in table(report)}
        for name in names:
            values = [table(report).get(name, "not set") for report in cluster.reports]
            yield from _outliers(cluster, f"{kind} {name}", values)
    devices = [report.device for report in cluster.reports]
    yield from _outliers(cluster, "device", devices)


def _outliers(cluster: ClusterReport, label: str, values: Sequence[str]) -> Iterator[str]:
    most_common = Counter(values).most_common(1)[0][0]
    for value in dict.fromkeys(values):
        if value != most_common:
            ranks = [rank for rank, own in enumerate(values) if own == value]
            yield f"{_locate(cluster, ranks)}: {label} is {value}, elsewhere {most_common}"


def _clock_problems(cluster: ClusterReport) -> Iterator[str]:
    for host, ranks in cluster.hosts.items():
        offsets = [cluster.clocks[rank] for rank in ranks] if cluster.clocks else []
        worst = max(offsets, key=abs, default=0.0)
        if abs(worst) > MAX_CLOCK_OFFSET_SECONDS:
            side = "ahead of" if worst > 0 else "behind"
            yield f"{host}: clock is {abs(worst):.1f} s {side} the clock of rank 0's host"


def _folder_problems(cluster: ClusterReport) -> Iterator[str]:
    for rank, view in enumerate(cluster.views):
        host = cluster.reports[rank].host
        if view.write_error is not None:
            yield f"{host}: {cluster.folder} is not writable ({view.write_error})"
        if view.unseen:
            others = ", ".join(cluster.reports[other].host for other in view.unseen)
            yield f"{host}: files written by {others} are not visible in {cluster.folder}"


def _device_problems(cluster: ClusterReport) -> Iterator[str]:
    users: dict[str, list[int]] = {}
    for report in cluster.reports:
        location = f"{report.host}, rank {report.rank}"
        gpu = report.gpu
        if report.device_error is not None:
            yield f"{location}: device fails: {report.device_error}"
        if gpu is None:
            continue
        users.setdefault(gpu.uuid, []).append(report.rank)
        if gpu.free < MIN_FREE_SHARE * gpu.memory:
            free, memory = format_in(gpu.free, "GiB", 0), format_in(gpu.memory, "GiB", 0)
            yield f"{location}: only {free} of {memory} GiB of GPU memory are free"
        if gpu.ecc_errors:
            yield f"{location}: GPU has {gpu.ecc_errors} uncorrected memory errors"
    for uuid, ranks in users.items():
        if len(ranks) > 1:
            yield f"{_locate(cluster, ranks)}: several ranks share one GPU ({uuid})"


def _slow_hosts(cluster: ClusterReport) -> Iterator[str]:
    speeds = cluster.host_speeds()
    for host, typical in _below_median(speeds, MIN_NETWORK_SHARE):
        yield (
            f"{host}: network bandwidth is {speeds[host] / 1e9:.2f} GB/s per rank, the median "
            f"host has {typical / 1e9:.2f}"
        )


def _slow_gpus(cluster: ClusterReport) -> Iterator[str]:
    speeds = {r.rank: r.gpu.teraflops for r in cluster.reports if r.gpu is not None}
    for rank, typical in _below_median(speeds, MIN_GPU_SHARE):
        yield (
            f"{cluster.reports[rank].host}, rank {rank}: GPU reaches {speeds[rank]:.0f} TFLOP/s, "
            f"the median GPU {typical:.0f}"
        )


def _below_median(speeds: Mapping[K, float], share: float) -> Iterator[tuple[K, float]]:
    """Yield the keys below a fraction of the median, with the median; none for few speeds."""
    if len(speeds) < MIN_FOR_OUTLIER:
        return
    typical = median(speeds.values())
    yield from ((key, typical) for key, speed in speeds.items() if speed < share * typical)


def _locate(cluster: ClusterReport, ranks: Sequence[int]) -> str:
    """Name the hosts of the ranks, and the ranks unless all ranks of these hosts are included."""
    hosts = cluster.hosts
    affected = {cluster.reports[rank].host: None for rank in ranks}
    all_ranks = sum(len(hosts[host]) for host in affected) == len(ranks)
    names = ", ".join(affected)
    return names if all_ranks else f"{names}, {_ranks(ranks)}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


HOST_COLUMNS = (
    *("host", "ranks", "devices", "clock, ms", "GB/s per rank"),
    *("matmul, TFLOP/s", "free memory, GiB"),
)
SPEED_COLUMNS = ("MiB per rank", "all-reduce, GB/s", "all-to-all, GB/s")


def print_cluster_report(cluster: ClusterReport, problems: Sequence[str], console: Console) -> None:
    """Print the tables, as Markdown unless the output is a terminal, and one line per problem."""
    versions = ", ".join(f"{name} {value}" for name, value in cluster.reports[0].versions.items())
    world = len(cluster.reports)
    print_lines(console, [f"{world} ranks on {len(cluster.hosts)} hosts. Rank 0 has {versions}"])
    print_table(console, HOST_COLUMNS, _host_rows(cluster))
    if cluster.speeds:
        print_table(console, SPEED_COLUMNS, _speed_rows(cluster))
    print_lines(console, (f"Problem: {problem}" for problem in problems))


def cluster_document(cluster: ClusterReport, problems: Sequence[str]) -> dict[str, Any]:
    """Return the results of all checks as JSON values; lists are indexed by rank."""
    return {
        "hosts": cluster.hosts,
        "ranks": [report.to_json() for report in cluster.reports],
        "clock_offsets": list(cluster.clocks),
        "folder": cluster.folder,
        "folder_views": [asdict(view) for view in cluster.views],
        "network": [asdict(speeds) for speeds in cluster.speeds],
        "problems": list(problems),
    }


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
            f"{network[host] / 1e9:.3g}" if host in network else "",
            f"{min(gpu.teraflops for gpu in gpus):.0f}" if gpus else "",
            format_in(min(gpu.free for gpu in gpus), "GiB", 0) if gpus else "",
        )


def _speed_rows(cluster: ClusterReport) -> Iterable[Sequence[str]]:
    """Yield the rows of the network measurements: medians over all ranks."""
    for size in cluster.speeds[0].all_reduce:
        all_reduce = median(speeds.all_reduce[size] for speeds in cluster.speeds)
        all_to_all = median(speeds.all_to_all[size] for speeds in cluster.speeds)
        yield f"{size / 2**20:g}", f"{all_reduce / 1e9:.3g}", f"{all_to_all / 1e9:.3g}"
