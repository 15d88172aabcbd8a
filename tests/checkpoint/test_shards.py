"""A rank's file is the one that safetensors writes, and its record is that of its bytes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import megagrow.checkpoint.save
from megagrow.checkpoint.save import Save
from megagrow.checkpoint.shards import own_tensors, planned_shard, write_shard
from megagrow.errors import CheckpointError
from tests.helpers.checkpoint.saving import MODEL
from tests.helpers.checkpoint.written import record_of
from tests.helpers.logs import captured_logs
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


@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_reads_back_differently_is_written_again_once(tmp_path, monkeypatch, times):
    save = Save(tmp_path, 7)
    save.partial.mkdir()
    written = []

    def writing(path, tensors):
        record = write_shard(path, tensors)
        written.append(path)
        if len(written) <= times:
            content = bytearray(path.read_bytes())
            content[-9] ^= 4
            path.write_bytes(content)
        return record

    monkeypatch.setattr(megagrow.checkpoint.save, "write_shard", writing)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with captured_logs() as messages:
        if times == 2:
            with pytest.raises(CheckpointError, match="twice after it was written; check the disk"):
                save.write(tensors_of(0))
        else:
            path = save.partial / "rank-00001.safetensors"
            assert save.write(tensors_of(0)) == {path.name: record_of(path)}
    assert len(written) == 2
    (line,) = messages
    assert "rank-00001.safetensors: damaged" in line and line.endswith("; writing it again")
