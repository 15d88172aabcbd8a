"""An examined cluster as its user sees it: its hosts, how fast they are, and what is wrong."""

from collections.abc import Iterable, Sequence
from statistics import median

from rich.console import Console
from rich.text import Text

from megagrow.common.sizes import format_in
from megagrow.common.tables import print_lines, print_table
from megagrow.doctor.diagnostics import ClusterReport

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
