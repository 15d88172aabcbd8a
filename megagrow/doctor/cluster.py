"""Preflight check of all ranks of a job: `megagrow doctor --cluster`.

The check is launched like a training run, by any launcher, and connects in the same way: through
the launcher's store, then with a process group of all ranks. Every wait has a timeout, and missing
ranks are named.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import Any

import torch.distributed as dist

from megagrow.doctor.diagnostics import ClusterReport
from megagrow.doctor.network import Speeds, measure_speeds, sizes_for
from megagrow.doctor.rank_report import RankReport, collect_report
from megagrow.doctor.rendezvous import Rendezvous
from megagrow.doctor.shared_folder import check_folder
from megagrow.errors import InputError, ResourceError
from megagrow.parallel.launch import Launch, own_device
from megagrow.parallel.process_groups import join_ranks


def examine_cluster(launch: Launch, folder: Path | None, seconds: float) -> ClusterReport:
    """Run all checks and return the report, which is the same on all ranks. Collective.

    `folder` is the shared folder to check, if not None; `seconds` is the timeout of every wait.
    Raises RankMissing on all present ranks if a rank does not arrive or stops responding, and
    InputError if the ranks cannot communicate.
    """
    rendezvous = Rendezvous(launch, seconds)
    try:
        own = collect_report(launch)
        values = rendezvous.all_gather("startup", own.to_json())
        reports = [RankReport.from_json(value) for value in values]
        hosts = ClusterReport(reports).hosts
        clocks = rendezvous.all_gather("clock offsets", rendezvous.clock_offset())
        views = []
        if folder is not None:
            first_of_host = hosts[own.host][0] == launch.rank
            views = check_folder(rendezvous, folder, first_of_host)
        speeds: list[Speeds] = []
        # A failing device would make the measurement fail as well.
        if launch.world_size > 1 and all(report.device_error is None for report in reports):
            speeds = _share_speeds(rendezvous, [*hosts.values()], seconds)
        return ClusterReport(
            reports, clocks, None if folder is None else str(folder), views, speeds
        )
    finally:
        rendezvous.close()


def _share_speeds(rendezvous: Rendezvous, hosts: list[list[int]], seconds: float) -> list[Speeds]:
    """Measure the network and return the speeds of all ranks, by rank.

    Raises InputError with the first error if the measurement fails on any rank.
    """
    own: dict[str, Any] | None = None
    error_text: str | None = None
    try:
        own = asdict(_measure(rendezvous, hosts, seconds))
    except RuntimeError as error:  # raised by torch.distributed for every backend
        error_text = str(error).strip().splitlines()[0]
    results = rendezvous.all_gather("network measurement", [own, error_text])
    errors = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(results) if text is not None]
    if errors:
        raise ResourceError(f"the ranks cannot communicate; {errors[0]}")
    return [_speeds_from_json(values) for values, _ in results]


def _measure(rendezvous: Rendezvous, hosts: list[list[int]], seconds: float) -> Speeds:
    launch, device = rendezvous.launch, own_device(rendezvous.launch)
    store = dist.PrefixStore("measurement", rendezvous.store)  # type: ignore[attr-defined]
    on_gpus = device.type == "cuda"
    timeout = timedelta(seconds=10 * seconds if on_gpus else seconds)
    with _abort_after(seconds, launch) if on_gpus else nullcontext():
        join_ranks(launch, store, timeout)
        speeds = measure_speeds(device, hosts, sizes_for(device))
        dist.destroy_process_group()
    return speeds


@contextmanager
def _abort_after(seconds: float, launch: Launch) -> Iterator[None]:
    """End the process with an error message if the block takes longer than `seconds`.

    A rank waiting inside NCCL receives no exception, and torch's own timeout aborts the process
    without a helpful message.
    """
    timer = Timer(seconds, _abort, [launch, seconds])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _abort(launch: Launch, seconds: float) -> None:
    """End the process with exit code 2, also if its main thread is blocked."""
    if launch.local_rank == 0:
        print(
            f"error: the ranks did not communicate over NCCL within {seconds:.0f} s; set "
            "NCCL_DEBUG=INFO to see where they wait",
            file=sys.stderr,
            flush=True,
        )
    os._exit(InputError.code)


def _speeds_from_json(values: dict[str, Any]) -> Speeds:
    """Build Speeds from JSON values, whose keys are strings."""
    by_size = [
        {int(size): speed for size, speed in values[kind].items()}
        for kind in ("all_reduce", "all_to_all")
    ]
    return Speeds(by_size[0], by_size[1], tuple(values["hosts"]))
