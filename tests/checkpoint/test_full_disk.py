"""A save that fails on any rank fails on all of them, and leaves earlier checkpoints whole."""

import errno
from pathlib import Path

import pytest
import torch.distributed as dist

from megagrow.checkpoint import save
from megagrow.checkpoint.discovery import checkpoint_name, list_checkpoints
from megagrow.checkpoint.load import load_storage
from megagrow.checkpoint.manifest import read_manifest, verify_checkpoint
from megagrow.errors import InputError
from tests.helpers import disks
from tests.helpers.checkpoint.saving import MODEL, save_random
from tests.helpers.reshard.definition import empty_storage, random_state, same, storage_of
from tests.helpers.reshard.models import layout_of
from tests.helpers.spawn import run_ranks

WORLD = 2
LAYOUT = layout_of(MODEL, 2, 2, 1)
STAGES = {
    "begin": "remove_unfinished",
    "shard": "write_shard",
    "manifest": "write_manifest",
    "publish": "publish_checkpoint",
}
"""The failing operation, by the name that save.py calls it."""


def no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(args[-1]))


def try_to_save(folder: Path, step: int) -> str:
    try:
        save_random(folder, step, LAYOUT)
    except InputError as error:
        return str(error)
    return "saved"


def fail_everywhere(folder: Path) -> dict[str, str]:
    """A good save, one that fails at each stage on one rank, and at last another good one."""
    out = {"first": try_to_save(folder, 1)}
    for what, name in STAGES.items():
        broken = dist.get_rank() == (1 if what == "shard" else 0)
        with pytest.MonkeyPatch.context() as patch:
            if broken:
                patch.setattr(save, name, no_space)
            out[what] = try_to_save(folder, 2)
        dist.barrier()
        out[f"after {what}"] = sorted(path.name for path in folder.iterdir())
        dist.barrier()
    return out | {"last": try_to_save(folder, 2), "the same again": try_to_save(folder, 2)}


@pytest.mark.dist
def test_a_failure_on_one_rank_is_the_same_error_on_all(tmp_path):
    folder = tmp_path / "checkpoints"
    found = run_ranks(WORLD, fail_everywhere, folder)
    assert found[0] == found[1]
    assert {found[0][when] for when in ("first", "last", "the same again")} == {"saved"}
    assert sorted(folder.iterdir()) == [folder / checkpoint_name(step) for step in (1, 2)]
    for what in STAGES:
        message, rank = found[0][what], "" if what == "begin" else "rank "
        assert message.startswith(f"checkpoint {folder / checkpoint_name(2)} was not saved: {rank}")
        assert "No space left on device" in message and "\n" not in message
        assert message.endswith(f"the newest one is {folder / checkpoint_name(1)}")
        assert found[0][f"after {what}"] == [checkpoint_name(1)], "nothing half written is left"
    for path in list_checkpoints(folder):
        read_manifest(path)


def never_saved(folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "write_shard", no_space)
        return try_to_save(folder, 1)


@pytest.mark.dist
def test_the_first_save_may_fail_too(tmp_path):
    (message,) = run_ranks(1, never_saved, tmp_path / "checkpoints")
    assert message.endswith("there is none before it")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own that holds one checkpoint but not two."""
    size = 3 * 4 * sum(spec.slice_numel(1) for spec in LAYOUT.plan.values())
    with disks.small_disk(tmp_path / "disk", int(1.5 * size)) as folder:
        yield folder


def fill_the_disk(folder: Path, looks: bool) -> tuple[str, str, bool]:
    """Two saves, and whether the first can still be loaded afterwards. Without a look at the room
    that there is before, as if the disk had been filled since."""
    with pytest.MonkeyPatch.context() as patch:
        if not looks:
            patch.setattr(save, "check_room", lambda *_: None)
        results = try_to_save(folder, 1), try_to_save(folder, 2)
    path = folder / checkpoint_name(1)
    mine = empty_storage(LAYOUT, dist.get_rank())
    load_storage(path, verify_checkpoint(path), LAYOUT, mine)
    state = random_state(LAYOUT.plan, seed=1)
    return *results, same(mine, storage_of(LAYOUT, state, dist.get_rank()))


@pytest.mark.dist
@pytest.mark.parametrize("looks", [True, False], ids=["seen before", "seen while writing"])
def test_a_disk_that_is_really_full(small_disk, looks):
    found = run_ranks(WORLD, fill_the_disk, small_disk, looks)
    assert found[0] == found[1]
    first, second, loaded = found[0]
    assert first == "saved" and loaded
    told = "KiB free, " if looks else "No space left on device"
    assert told in second and "\n" not in second
    assert second.endswith(f"the newest one is {small_disk / checkpoint_name(1)}")
    assert [path.name for path in small_disk.iterdir()] == [checkpoint_name(1)]


@pytest.mark.dist
def test_a_directory_that_may_only_be_read(tmp_path):
    with disks.read_only(tmp_path / "disk") as folder:
        found = run_ranks(WORLD, try_to_save, folder / "checkpoints", 1)
    assert found[0] == found[1] and "Read-only file system" in found[0]
    assert found[0].endswith("there is none before it")
