"""A rank's file is the one that safetensors writes, and its record is that of its bytes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megagrow.checkpoint.async_saver import Snapshot
from megagrow.checkpoint.shards import own_tensors, planned_shard, write_shard
from tests.helpers.checkpoint.saving import MODEL
from tests.helpers.checkpoint.written import record_of
from tests.helpers.reshard.definition import random_state, storage_of
from tests.helpers.reshard.models import layout_of

LAYOUT = layout_of(MODEL, 3, 2, 2)


def tensors_of(rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    state = random_state(LAYOUT.plan, seed)
    return own_tensors(LAYOUT, storage_of(LAYOUT, state, rank), rank)


@pytest.mark.parametrize("rank", range(4))
def test_what_is_written_is_what_safetensors_writes(tmp_path, rank):
    tensors = tensors_of(rank)
    record = write_shard(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert record == record_of(tmp_path / "theirs")
    assert record.size == planned_shard(tensors).size


def test_a_tensor_larger_than_what_is_written_at_once(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.randn(2**19 + 5), "c": torch.randn(1)}
    assert write_shard(tmp_path / "file", tensors) == record_of(tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_what_was_there_before_is_written_over(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 2**20)
    assert write_shard(tmp_path / "file", tensors_of(0)) == record_of(tmp_path / "file")


def test_a_disk_that_refuses_is_named_with_the_file(tmp_path):
    with pytest.raises(OSError, match=r"Is a directory: '.*file'"):
        (tmp_path / "file").mkdir()
        write_shard(tmp_path / "file", tensors_of(0))


@pytest.mark.parametrize("reserved", [0, 10**6], ids=["too little", "enough"])
def test_a_snapshot_stays_while_the_state_moves_on(reserved):
    snapshot = Snapshot(torch.device("cpu"))
    snapshot.reserve(elements=reserved)
    first, second = tensors_of(0, seed=1), tensors_of(0, seed=2)
    taken = snapshot.take(first)
    place = taken["model.norm.weight.fp32"].data_ptr()
    for name, tensor in first.items():
        kept = tensor.clone()
        tensor.zero_()
        assert torch.equal(taken[name], kept) and taken[name].data_ptr() != tensor.data_ptr()
    again = snapshot.take(second)
    assert again["model.norm.weight.fp32"].data_ptr() == place, "one buffer serves every save"
    assert all(torch.equal(again[name], tensor) for name, tensor in second.items())
    snapshot.release()
    larger = second | {"more": torch.ones(5)}
    assert all(torch.equal(t, larger[name]) for name, t in snapshot.take(larger).items())
