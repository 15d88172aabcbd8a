"""`megagrow doctor --cluster`: the ranks of a job look at themselves and at each other.

It is started as a run is, by any launcher, and takes the same ways: the launcher's store, then a
process group on all ranks. It never waits without an end; whoever does not come is named.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from threading import Timer
from typing import Any

import torch.distributed as dist

from megagrow.doctor.diagnostics import ClusterReport
from megagrow.doctor.network import Speeds, measure_speeds, sizes_for
from megagrow.doctor.rank_report import RankReport, own_report
from megagrow.doctor.rendezvous import Meeting
from megagrow.doctor.shared_folder import look_at_folder
from megagrow.errors import ConfigError
from megagrow.parallel.launch import Launch, own_device
from megagrow.parallel.process_groups import join_ranks

ReportFunction = Callable[[Launch], RankReport]


def examine(
    launch: Launch, folder: Path | None, seconds: float, look: ReportFunction = own_report
) -> ClusterReport:
    """All that the ranks find out; all ranks call it together and get the same.

    `folder` is looked at if it is given; `seconds` are those of every wait. RankMissing, on all
    ranks that are there, where one does not come or does not get on; InputError where they can
    not talk to each other.
    """
    meeting = Meeting(launch, seconds)
    try:
        own = look(launch)
        said = meeting.share("the meeting", own.to_json())
        reports = [RankReport.from_json(each) for each in said]
        hosts = ClusterReport(reports).hosts
        clocks = meeting.share("the clocks", meeting.clock_offset())
        views = []
        if folder is not None:
            first_of_host = hosts[own.host][0] == launch.rank
            views = look_at_folder(meeting, folder, first_of_host)
        speeds: list[Speeds] = []
        # A device that fails would only take the measurement down with it.
        if launch.world_size > 1 and all(report.trouble is None for report in reports):
            speeds = _speeds(meeting, [*hosts.values()], seconds)
        return ClusterReport(
            reports, clocks, None if folder is None else str(folder), views, speeds
        )
    finally:
        meeting.leave()


def _speeds(meeting: Meeting, hosts: list[list[int]], seconds: float) -> list[Speeds]:
    """By rank; who does not get through is named, with the reason of the first one that has one."""
    found: dict[str, Any] | None = None
    trouble: str | None = None
    try:
        found = asdict(_own_speeds(meeting, hosts, seconds))
    except RuntimeError as error:  # as torch.distributed raises, whatever the backend
        trouble = str(error).strip().splitlines()[0]
    said = meeting.share("the measurement", [found, trouble])
    reasons = [f"rank {rank}: {why}" for rank, (_, why) in enumerate(said) if why is not None]
    if reasons:
        raise ConfigError(f"the ranks cannot talk to each other; {reasons[0]}")
    return [_speeds_of(values) for values, _ in said]


def _own_speeds(meeting: Meeting, hosts: list[list[int]], seconds: float) -> Speeds:
    launch, device = meeting.launch, own_device(meeting.launch)
    store = dist.PrefixStore("measurement", meeting.store)  # type: ignore[attr-defined]
    on_gpus = device.type == "cuda"
    patience = timedelta(seconds=10 * seconds if on_gpus else seconds)
    with _ended_after(seconds, launch) if on_gpus else nullcontext():
        join_ranks(launch, store, patience)
        speeds = measure_speeds(device, hosts, sizes_for(device))
        dist.destroy_process_group()
    return speeds


@contextmanager
def _ended_after(seconds: float, launch: Launch) -> Iterator[None]:
    """For ranks that may wait within NCCL, where no exception reaches them: after its own timeout
    torch would abort the process, and say nothing that helps."""
    timer = Timer(seconds, _end, [launch, seconds])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(launch: Launch, seconds: float) -> None:
    """Ends the process, whatever its main thread waits for."""
    if launch.local_rank == 0:
        print(
            f"error: the ranks have not talked to each other over NCCL within {seconds:.0f} s; "
            "NCCL_DEBUG=INFO shows where they wait",
            file=sys.stderr,
            flush=True,
        )
    os._exit(2)


def _speeds_of(values: dict[str, Any]) -> Speeds:
    """From JSON, whose keys are texts."""
    by_size = [
        {int(size): speed for size, speed in values[kind].items()}
        for kind in ("all_reduce", "all_to_all")
    ]
    return Speeds(by_size[0], by_size[1], tuple(values["hosts"]))
