"""Printed report of a cluster check: hosts, speeds and problems."""

from collections.abc import Iterable, Sequence
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megagrow.doctor.diagnostics import ClusterReport

HOST_COLUMNS = (
    *("host", "ranks", "devices", "clock, ms", "GB/s per rank"),
    *("matmul, TFLOP/s", "free memory, GiB"),
)
SPEED_COLUMNS = ("MiB per rank", "all-reduce, GB/s", "all-to-all, GB/s")


def print_cluster_report(cluster: ClusterReport, problems: Sequence[str], console: Console) -> None:
    """Print the tables, as Markdown unless the output is a terminal, and one line per problem."""
    versions = ", ".join(f"{name} {value}" for name, value in cluster.reports[0].versions.items())
    world = len(cluster.reports)
    console.print(Text(f"{world} ranks on {len(cluster.hosts)} hosts. Rank 0 has {versions}"))
    _print(console, HOST_COLUMNS, _host_rows(cluster))
    if cluster.speeds:
        _print(console, SPEED_COLUMNS, _speed_rows(cluster))
    for problem in problems:
        console.print(Text(f"Problem: {problem}"), soft_wrap=True)


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
            f"{min(gpu.free for gpu in gpus) / 2**30:.0f}" if gpus else "",
        )


def _speed_rows(cluster: ClusterReport) -> Iterable[Sequence[str]]:
    """Yield the rows of the network measurements: medians over all ranks."""
    for size in cluster.speeds[0].all_reduce:
        all_reduce = median(speeds.all_reduce[size] for speeds in cluster.speeds)
        all_to_all = median(speeds.all_to_all[size] for speeds in cluster.speeds)
        yield f"{size / 2**20:g}", f"{all_reduce / 1e9:.2f}", f"{all_to_all / 1e9:.2f}"


def _print(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns, box=box.ROUNDED if console.is_terminal else box.MARKDOWN)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
