"""Files written in pieces are those of safetensors, byte for byte; damaged ones are refused."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from megagrow.checkpoint.tensor_file import Stored, planned, raw_bytes, read_elements, read_header
from megagrow.errors import InputError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Names in no order, shapes of one and two dimensions, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"z": (3,), "model.10.w": (2, 5), "model.9.w": (7, 1), "a": (0,), "model.norm": (1,)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_what_safetensors_writes(tmp_path, dtype, metadata):
    given = tensors(DTYPES[dtype])
    save_file(given, tmp_path / "theirs", metadata=metadata)
    plan = planned({n: Stored(dtype, tuple(t.shape)) for n, t in given.items()}, metadata)
    ours = bytearray(plan.size)
    ours[: len(plan.header)] = plan.header
    for name, stored in plan.tensors.items():
        ours[stored.begin : stored.begin + stored.nbytes] = raw_bytes(given[name])
    assert bytes(ours) == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_are_read_from_anywhere(tmp_path, dtype):
    given = tensors(DTYPES[dtype])
    save_file(given, tmp_path / "file")
    header = read_header(tmp_path / "file")
    assert {n: s.shape for n, s in header.items()} == {n: tuple(t.shape) for n, t in given.items()}
    read = read_elements(tmp_path / "file", header["model.10.w"], range(3, 8))
    assert torch.equal(read, given["model.10.w"].flatten()[3:8])


def damaged(header: object, data: int = 4) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGES = {
    "empty": b"",
    "no header": struct.pack("<Q", 2**40) + b"{}",
    "no json": damaged(b"{{"),
    "not an object": damaged([1]),
    "no shape": damaged({"w": {"dtype": "F32", "data_offsets": [0, 4]}}),
    "other size": damaged({"w": ENTRY | {"shape": [3]}}, 8),
    "truncated": damaged({"w": ENTRY}, 7),
    "longer than its tensors": damaged({"w": ENTRY}, 9),
    "a hole": damaged({"w": ENTRY, "v": ENTRY | {"data_offsets": [9, 17]}}, 17),
    "an overlap": damaged({"w": ENTRY, "v": ENTRY | {"data_offsets": [4, 12]}}, 12),
    "the same place twice": damaged({"w": ENTRY, "v": ENTRY}, 8),
    "not from the first byte": damaged({"w": ENTRY | {"data_offsets": [1, 9]}}, 9),
    "backwards": damaged({"w": ENTRY | {"shape": [-2], "data_offsets": [8, 0]}}, 0),
    "two negatives": damaged({"w": ENTRY | {"shape": [-2, -1]}}, 8),
    "beyond the file": damaged({"w": ENTRY | {"shape": [2**40], "data_offsets": [0, 2**42]}}, 8),
    "a product of 64 bits": damaged({"w": ENTRY | {"shape": [2**62, 8]}}, 8),
    "endless axes": damaged({"w": ENTRY | {"shape": [2, *[1] * 1000]}}, 8),
    "not whole": damaged({"w": ENTRY | {"shape": [2.0]}}, 8),
    "a truth": damaged({"w": ENTRY | {"shape": [True, 2]}}, 8),
    "a list as type": damaged({"w": ENTRY | {"dtype": []}}, 8),
    "twice": damaged(b'{"w":' + json.dumps(ENTRY).encode() + b',"w":1}', 8),
    "deep": damaged(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "metadata": damaged({"__metadata__": {"a": 1}, "w": ENTRY}, 8),
    "a blank first": damaged(b" " + json.dumps({"w": ENTRY}).encode(), 8),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / "file").write_bytes(DAMAGES[name])
    with pytest.raises(InputError, match="file: not a complete safetensors file"):
        read_header(tmp_path / "file")


def test_a_file_that_is_cut_later_is_named(tmp_path):
    save_file({"w": torch.ones(4)}, tmp_path / "file")
    stored = read_header(tmp_path / "file")["w"]
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(InputError, match="file: ends before byte"):
        read_elements(tmp_path / "file", stored, range(4))
