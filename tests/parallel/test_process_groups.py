"""Ranks in a grid, what the launcher says, and errors that all ranks raise together."""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.testing._internal.distributed.fake_pg import FakeStore

from megagrow.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    ResourceError,
)
from megagrow.parallel import launch
from megagrow.parallel.agreement import run_on_all_ranks, run_on_rank_zero
from megagrow.parallel.launch import Launch, read_launch
from megagrow.parallel.process_groups import TIMEOUT, make_topology
from tests.helpers.spawn import run_ranks

LAUNCH = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.fixture
def launcher(monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_without_a_launcher_there_is_one_rank(launcher):
    assert read_launch() == Launch(rank=0, world_size=1, local_rank=0)


def test_what_the_launcher_says_is_read(launcher):
    launcher(**LAUNCH)
    assert read_launch() == Launch(rank=3, world_size=8, local_rank=1)


def test_torchrun_reads_the_message_of_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "error.json"
    launch.record_failure("error: without torchrun")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    launch.record_failure("error: wrong key")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    text = str(ChildFailedError("megagrow", {0: failure}))
    assert text.splitlines()[-2] == "  traceback : error: wrong key"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "none" / "error.json"))
    launch.record_failure("error: on a full disk")


@pytest.mark.parametrize("missing", LAUNCH)
def test_half_a_launch_is_refused_and_what_is_missing_named(launcher, missing):
    launcher(**{name: value for name, value in LAUNCH.items() if name != missing})
    with pytest.raises(InputError, match=f"but not {missing}; set all three$"):
        read_launch()


@pytest.mark.parametrize(
    ("gpu", "configured", "expected"),
    [
        (True, {}, "expandable_segments:True"),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        (True, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
        (False, {}, None),
    ],
)
def test_the_gpu_allocator_is_configured_unless_the_user_did(
    monkeypatch, gpu, configured, expected
):
    for name in launch.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in configured.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    launch.use_expandable_segments()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
    os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)


def options_of(group: Any) -> Any:
    return group._get_backend(torch.device("cpu")).options


def grid(tp: int) -> tuple:
    """Coordinates of this rank, and the members of its two groups."""
    topology = make_topology(tp, torch.device("cpu"))
    groups = [
        dist.get_process_group_ranks(group) for group in (topology.tp_group, topology.dp_group)
    ]
    sums = []
    for group in (topology.tp_group, topology.dp_group):
        total = torch.tensor([10.0**topology.rank])
        dist.all_reduce(total, group=group)
        sums.append(int(total))
    where = topology.dp, topology.tp, topology.dp_rank, topology.tp_rank, topology.world_size
    mpu = (
        topology.get_data_parallel_world_size(),
        topology.get_model_parallel_world_size(),
        topology.get_data_parallel_rank(),
        topology.get_model_parallel_rank(),
        topology.get_data_parallel_group() is topology.dp_group,
        topology.get_model_parallel_group() is topology.tp_group,
    )
    return where, mpu, groups, sums


@pytest.fixture
def new_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """Rank 83 of 1,024 ranks without peers; the members and timeouts of the groups it creates."""
    dist.init_process_group("fake", store=FakeStore(), rank=83, world_size=1024)
    created, original = [], dist.new_group

    def new_group(ranks: list[int], timeout: timedelta, **options: Any) -> Any:
        created.append((ranks, timeout, options))
        return original(ranks, timeout, **options)

    monkeypatch.setattr(dist, "new_group", new_group)
    yield created
    dist.destroy_process_group()


def test_a_rank_creates_each_of_its_groups_once(new_groups: list[tuple]) -> None:
    cpu = torch.device("cpu")
    first = make_topology(1, cpu)
    own = ([83], TIMEOUT, {"use_local_synchronization": True})
    assert new_groups == [own]
    assert first.dp_group is dist.group.WORLD
    eight = make_topology(8, cpu)
    assert [ranks for ranks, *_ in new_groups[1:]] == [[*range(80, 88)], [*range(3, 1024, 8)]]
    assert (eight.tp_group.rank(), eight.dp_group.rank()) == (3, 10)
    for tp, before in ((1, first), (8, eight)):  # a rewind and another growth
        again = make_topology(tp, cpu)
        assert (again.tp_group, again.dp_group) == (before.tp_group, before.dp_group)
    assert make_topology(1024, cpu).tp_group is dist.group.WORLD
    assert len(new_groups) == 3


def failing(ranks: list[int], kind: type[Exception]) -> str:
    """Return the error that `run_on_all_ranks` raises where some ranks fail; their texts differ."""

    def action() -> int:
        if dist.get_rank() in ranks:
            raise kind(f"trouble {dist.get_rank()}" if len(ranks) < 4 else "trouble everywhere")
        return dist.get_rank()

    try:
        return f"returned {run_on_all_ranks(action)}"
    except InputError as error:
        return str(error)


CLASSES = (ConfigError, DataError, CheckpointError, ResourceError, InputError)


def class_after(collective: Callable[[Callable[[], None]], None], kind: type[Exception]) -> type:
    """Return the class that a collective raises on this rank if rank 0 raises `kind`."""

    def action() -> None:
        if dist.get_rank() == 0:
            raise kind("trouble")

    try:
        collective(action)
    except InputError as error:
        return type(error)
    return type(None)


def classes() -> list[list[type]]:
    """Return the classes raised for `CLASSES` and OSError by both collectives."""
    return [
        [class_after(collective, kind) for kind in (*CLASSES, OSError)]
        for collective in (run_on_rank_zero, run_on_all_ranks)
    ]


@pytest.mark.dist
def test_all_ranks_raise_the_class_of_the_failing_rank() -> None:
    assert run_ranks(2, classes) == [[[*CLASSES, ResourceError]] * 2] * 2


def everything() -> tuple:
    options_of(dist.group.WORLD)._timeout = timedelta(minutes=7)
    grids = [grid(tp) for tp in (1, 2, 4)]
    two = make_topology(2, torch.device("cpu"))
    for group in (two.tp_group, two.dp_group):
        assert options_of(group)._timeout == timedelta(minutes=7)
    errors = [
        failing(ranks, kind)
        for kind in (InputError, OSError)
        for ranks in ([], [2], [1, 3], [0, 1, 2, 3])
    ]
    dist.barrier()  # after all that the ranks are still in step
    return grids, errors


@pytest.fixture(scope="module")
def found() -> list[tuple]:
    return run_ranks(4, everything)


@pytest.mark.dist
def test_tensor_parallel_ranks_are_neighbours(found):
    for rank in range(4):
        for (where, mpu, groups, sums), tp in zip(found[rank][0], (1, 2, 4), strict=True):
            dp, dp_rank, tp_rank = 4 // tp, rank // tp, rank % tp
            assert where == (dp, tp, dp_rank, tp_rank, 4)
            assert mpu == (dp, tp, dp_rank, tp_rank, True, True)
            neighbours = [dp_rank * tp + t for t in range(tp)]
            peers = [d * tp + tp_rank for d in range(dp)]
            assert groups == [neighbours, peers]
            assert sums == [sum(10**r for r in neighbours), sum(10**r for r in peers)]


@pytest.mark.dist
def test_an_error_on_one_rank_is_the_same_error_on_all(found):
    for rank in range(4):
        expected = [
            f"returned {rank}",
            "rank 2: trouble 2",
            "rank 1: trouble 1",
            "trouble everywhere",
        ]
        assert found[rank][1] == expected * 2


def broken() -> str:
    try:
        run_on_all_ranks(lambda: 1 / 0)
    except ZeroDivisionError:
        return "raised as it is"
    return "swallowed"


@pytest.mark.dist
def test_a_bug_is_not_taken_for_bad_input():
    assert run_ranks(1, broken) == ["raised as it is"]
