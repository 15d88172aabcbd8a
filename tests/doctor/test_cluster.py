"""megagrow doctor --cluster: detection of problems, and timeouts of all waits."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import megagrow.doctor.cluster as doctor_cluster
import megagrow.doctor.rank_report as doctor_report
from megagrow.doctor.diagnostics import ClusterReport, find_problems
from megagrow.doctor.network import ROUNDS, Speeds, round_robin_pairs
from megagrow.doctor.rank_report import GpuReport, RankReport, collect_report
from megagrow.doctor.rendezvous import Rendezvous
from megagrow.doctor.shared_folder import FolderView
from megagrow.parallel.launch import Launch
from tests.helpers.jobs import Finished, Job

GIB = 2**30
VERSIONS = {"python": "3.12.1", "torch": "2.11.0", "code": "abc"}
VARIABLES = {"NCCL_DEBUG": "WARN"}


def report(rank: int) -> RankReport:
    """Two ranks on each host."""
    gpu = GpuReport(f"GPU-{rank}", 80 * GIB, 79 * GIB, 700.0, 0)
    host = f"node{rank // 2}"
    return RankReport(rank, rank % 2, host, "H100", VERSIONS, VARIABLES, gpu)


REPORTS = [report(rank) for rank in range(8)]


def with_rank(rank: int, **changes: object) -> ClusterReport:
    reports = list(REPORTS)
    reports[rank] = replace(reports[rank], **changes)
    return ClusterReport(reports)


def with_gpu(rank: int, **changes: object) -> ClusterReport:
    return with_rank(rank, gpu=replace(REPORTS[rank].gpu, **changes))


def test_equal_ranks_have_no_problems() -> None:
    equal = [Speeds({}, {}, (1e9, 0.9e9))] * 8
    seen = [FolderView()] * 8
    assert find_problems(ClusterReport(REPORTS, [0.01] * 8, "/runs", seen, equal)) == []


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (
            with_rank(3, versions=VERSIONS | {"torch": "2.13.0"}),
            "node1, rank 3: version of torch is 2.13.0, elsewhere 2.11.0",
        ),
        (with_rank(5, variables={}), "node2, rank 5: variable NCCL_DEBUG is not set, elsewhere W"),
        (with_rank(0, device="A100"), "node0, rank 0: device is A100, elsewhere H100"),
        (
            with_rank(6, gpu=None, device_error="CUDA error"),
            "node3, rank 6: device fails: CUDA err",
        ),
        (with_gpu(1, free=40 * GIB), "node0, rank 1: only 40 of 80 GiB of GPU memory are free"),
        (with_gpu(1, ecc_errors=2), "node0, rank 1: GPU has 2 uncorrected memory errors"),
        (with_gpu(1, ecc_errors=None, teraflops=720.0), None),
        (with_gpu(4, teraflops=590.0), "node2, rank 4: GPU reaches 590 TFLOP/s, the median GPU 7"),
        (with_gpu(3, uuid="GPU-2"), "node1: several ranks share one GPU (GPU-2)"),
    ],
)
def test_deviating_rank_is_named(cluster: ClusterReport, message: str | None) -> None:
    lines = find_problems(cluster)
    assert len(lines) == (message is not None)
    assert message is None or lines[0].startswith(message), lines


def test_a_host_with_another_version_is_named_once() -> None:
    other = VERSIONS | {"torch": "2.13.0"}
    reports = [replace(r, versions=other) if r.host == "node2" else r for r in REPORTS]
    assert find_problems(ClusterReport(reports)) == [
        "node2: version of torch is 2.13.0, elsewhere 2.11.0",
    ]


def test_clocks_and_folders() -> None:
    clocks = [0.0, 0.001, 0.0, 0.001, -3.21, -3.22, 0.4, 0.4]
    views = [FolderView()] * 8
    views[2] = FolderView("Permission denied")
    views[6] = FolderView(None, (0, 4))
    assert find_problems(ClusterReport(REPORTS, clocks, "/runs", views)) == [
        "node2: clock is 3.2 s behind the clock of rank 0's host",
        "node1: /runs is not writable (Permission denied)",
        "node3: files written by node0, node2 are not visible in /runs",
    ]


@pytest.mark.parametrize("count", range(2, 10))
def test_in_each_round_every_host_has_a_new_partner(count: int) -> None:
    rounds = round_robin_pairs(count, 100)
    assert len(rounds) == count - 1 + count % 2
    assert round_robin_pairs(count, ROUNDS) == rounds[:ROUNDS]
    for partners in rounds:
        assert all(partners[b] == a != b for a, b in partners.items())
        assert len(partners) == count - count % 2
    for one in range(count):
        met = [partners[one] for partners in rounds if one in partners]
        assert sorted(met) == [other for other in range(count) if other != one]


@pytest.mark.parametrize("count", [3, 4, 5, 8])
@pytest.mark.parametrize("slow", [0, 2])
def test_the_slow_host_is_named_and_not_its_partners(count: int, slow: int) -> None:
    """A pair is as slow as the slower of the two."""
    own = [4e9 if host == slow else 10e9 for host in range(count)]
    speeds = []
    for host in range(count):
        met = [partners[host] for partners in round_robin_pairs(count, ROUNDS) if host in partners]
        speeds.append(Speeds({}, {}, tuple(min(own[host], own[other]) for other in met)))
    reports = [replace(report(rank), host=f"node{rank}") for rank in range(count)]
    assert find_problems(ClusterReport(reports, speeds=speeds)) == [
        f"node{slow}: network bandwidth is 4.00 GB/s per rank, the median host has 10.00"
    ]


def test_two_hosts_do_not_identify_the_slow_one() -> None:
    speeds = [Speeds({}, {}, (1e9,)), Speeds({}, {}, (9e9,))] * 2
    assert find_problems(ClusterReport(REPORTS[:4], speeds=speeds)) == []


def test_memory_errors_are_those_of_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_report._ecc_errors("GPU-1") is None, "nvidia-smi is missing"
    program = tmp_path / "nvidia-smi"
    for output, count in (("3", 3), ("[N/A]", None)):
        program.write_text(f'#!/bin/sh\n[ "$4" = GPU-1 ] && echo "{output}"\n')
        program.chmod(0o755)
        assert doctor_report._ecc_errors("GPU-1") == count


def test_a_failing_device_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_report, "own_device", lambda launch: torch.device("cuda", 0))
    own = collect_report(Launch(0, 1, 0))
    assert own.gpu is None and own.device_error
    assert RankReport.from_json(own.to_json()) == own
    assert RankReport.from_json(report(1).to_json()) == report(1)


Hook = Callable[[int, pytest.MonkeyPatch], None]


def doctor(folder: Path, world: int, *words: str, hook: Hook | None = None) -> Finished:
    return Job(folder / "job", world, ["doctor", "--cluster", *words], hook).finish(timeout=60)


def words_of(job: Finished) -> str:
    return " ".join(job.out[0].split())


@pytest.mark.dist
def test_four_healthy_ranks(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    job = doctor(tmp_path, 4, "--output-dir", str(shared))
    assert (job.codes, job.err) == ([0] * 4, [""] * 4)
    output = words_of(job)
    assert f"4 ranks on 1 hosts. Rank 0 has python {sys.version.split()[0]}" in output
    assert f"| {socket.gethostname()} | 0-3 | 4 x cpu |" in output
    rows = [line.split("|")[1:-1] for line in job.out[0].splitlines() if line.startswith("| 0.06")]
    assert len(rows) == 1 and all(float(cell) > 0 for cell in rows[0])
    assert job.out[1:] == [""] * 3
    assert list(shared.iterdir()) == []


@pytest.mark.dist
def test_json_of_two_ranks_is_alone_on_stdout(tmp_path: Path) -> None:
    shared = str(tmp_path / "shared")
    job = doctor(tmp_path, 2, "--output-dir", shared, "--json")
    assert job.codes == [0, 0] and job.out[1] == ""
    found = json.loads(job.out[0])
    assert [report["rank"] for report in found["ranks"]] == [0, 1]
    assert found["hosts"] == {socket.gethostname(): [0, 1]}
    assert (found["folder"], found["problems"]) == (shared, [])
    for speeds in found["network"]:
        assert len(speeds["all_reduce"]) == 3 and all(speeds["all_reduce"].values())


def disagree(rank: int, patch: pytest.MonkeyPatch) -> None:
    """Put rank 1 on another host with other versions, another clock and another folder."""
    patch.setattr(socket, "gethostname", lambda: f"host{rank}")
    if rank == 1:
        patch.setenv("NCCL_DEBUG", "INFO")
        patch.setattr(doctor_report, "package_version", lambda package: f"{package}-of-host1")
        original = Rendezvous.clock_offset
        patch.setattr(Rendezvous, "clock_offset", lambda self: original(self) + 7)
        sys.argv[-1] += "-of-host1"


@pytest.mark.dist
def test_two_hosts_that_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagrow.doctor.shared_folder.VISIBILITY_SECONDS", 0.3)
    job = doctor(tmp_path, 2, "--output-dir", str(tmp_path / "shared"), hook=disagree)
    assert job.codes == [2, 2]
    problems = [line for line in job.out[0].splitlines() if line.startswith("Problem: ")]
    packages = doctor_report.COMPARED_PACKAGES
    assert [line.split(" is ")[0].split(" are ")[0] for line in problems] == [
        *(f"Problem: host1: version of {name}" for name in packages),
        "Problem: host1: variable NCCL_DEBUG",
        "Problem: host1: clock",
        *(f"Problem: host{i}: files written by host{1 - i}" for i in range(2)),
    ]  # fmt: skip
    assert "host1: clock is 7.0 s ahead of the clock of rank 0's host" in job.out[0]
    assert job.err[0].startswith(f"error: the cluster has {len(problems)} problems: host1: ")
    for folder in ("shared", "shared-of-host1"):
        assert list((tmp_path / folder).iterdir()) == []


def no_folder(rank: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(socket, "gethostname", lambda: f"host{rank}")
    if rank == 1:
        sys.argv[-1] = str(Path(sys.argv[-1]).parent / "a file" / "within")


@pytest.mark.dist
def test_a_host_that_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    job = doctor(tmp_path, 2, "--output-dir", str(tmp_path / "shared"), hook=no_folder)
    assert job.codes == [2, 2]
    shared = tmp_path / "shared"
    assert f"Problem: host1: {shared} is not writable (Not a directory)" in job.out[0]
    assert job.err[0].startswith("error: the cluster has 1 problem: host1: ")


def missing(which: int) -> Hook:
    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        if rank == which:
            os._exit(0)

    return hook


@pytest.mark.dist
@pytest.mark.parametrize(
    ("which", "message"),
    [
        (2, "rank 2 did not arrive within 3 s (startup); 2 of 3 ranks are present"),
        (0, "rank 0 at 127.0.0.1 is unreachable after 3 s; check that it is running and that its"),
    ],
)
def test_missing_rank_is_named(tmp_path: Path, which: int, message: str) -> None:
    begin = time.monotonic()
    job = doctor(tmp_path, 3, "--timeout", "3", hook=missing(which))
    assert time.monotonic() - begin < 30
    assert job.codes == [0 if rank == which else 2 for rank in range(3)]
    errors = [line for err in job.err for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {message}"), job.err


def dies_measuring(rank: int, patch: pytest.MonkeyPatch) -> None:
    if rank == 1:
        patch.setattr(doctor_cluster, "measure_speeds", lambda *_: os._exit(7))


@pytest.mark.dist
def test_a_rank_that_dies_in_the_measurement_is_named(tmp_path: Path) -> None:
    job = doctor(tmp_path, 3, "--timeout", "3", hook=dies_measuring)
    assert job.codes == [2, 7, 2]
    errors = [line for line in job.err[0].splitlines() if line.startswith("error: ")]
    message = "rank 1 did not arrive within 3 s (network measurement); 2 of 3 ranks are present"
    assert errors == [f"error: {message}"]
