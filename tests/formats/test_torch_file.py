"""Files of torch.save are read where their numbers stand and written as torch itself would, and
nothing that stands in them is run."""

import argparse
import enum
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.tensor_file import Stored, read_elements
from megagrow.errors import InputError
from megagrow.formats.torch_file import (
    Streamed,
    check_torch_file,
    read_torch_file,
    write_torch_file,
)
from megagrow.formats.torch_pickle import Unread
from tests.helpers.formats.malicious import Malicious


def streamed(tensor: torch.Tensor, dtype: str = "F32", rows: int = 2) -> Streamed:
    return Streamed(dtype, tuple(tensor.shape), lambda: iter(tensor.split(rows)))


def write(path: Path, value: Any) -> int:
    told: list[int] = []
    write_torch_file(path, value, told.append)
    check_torch_file(path)
    return sum(told)


def numbers(path: Path, stored: Stored) -> torch.Tensor:
    size = int(np.prod(stored.shape, dtype=np.int64))
    return read_elements(path, stored, range(size)).view(stored.shape)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written(tmp_path, mmap):
    matrix, vector = torch.randn(5, 7), torch.randn(3)
    values = {"step": 2**40, "eps": 1e-8, "names": ["a", "b"], "none": None, "yes": True}
    args = argparse.Namespace(layers=2, wide=[-1, 300, 70000])
    tree = values | {
        "args": args,
        "m": {"x": streamed(matrix), "y": [streamed(vector)]},
        "half": streamed(matrix, "F16"),
        "bf16": streamed(matrix, "BF16"),
        "empty": streamed(torch.empty(0, 4)),
        "one": Streamed("F32", (), lambda: iter([torch.tensor(7.0)])),
    }
    assert write(tmp_path / "a.pt", tree) == 4 * 35 + 4 * 3 + 2 * 35 + 2 * 35 + 4
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    assert {key: found[key] for key in values} == values and found["args"] == args
    assert torch.equal(found["m"]["x"], matrix) and torch.equal(found["m"]["y"][0], vector)
    assert torch.equal(found["half"], matrix.half())
    assert torch.equal(found["bf16"], matrix.bfloat16())
    assert found["empty"].shape == (0, 4) and found["one"].shape == () and found["one"] == 7
    assert all(t.data_ptr() % 64 == 0 for t in (found["half"], found["bf16"])) or not mmap


def test_a_file_that_changed_on_the_disk_is_named(tmp_path):
    write(tmp_path / "a.pt", {"x": streamed(torch.ones(100))})
    place = read_torch_file(tmp_path / "a.pt")["x"].begin
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[place + 9] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises((InputError, zipfile.BadZipFile), match=r"data/0"):
        check_torch_file(tmp_path / "a.pt")


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=4))
def test_numbers_of_a_file_of_theirs_are_found(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("theirs") / "a.pt"
    tensors = [torch.randn(shape) for shape in shapes]
    torch.save({"list": tensors, "part": torch.arange(90.0)[30:40], "tuple": (1, "x")}, path)
    found = read_torch_file(path)
    for stored, tensor in zip(found["list"], tensors, strict=True):
        assert stored.dtype == "F32" and torch.equal(numbers(path, stored), tensor)
    assert torch.equal(numbers(path, found["part"]), torch.arange(30.0, 40.0))
    assert found["tuple"] == [1, "x"]


def test_tensors_that_are_not_as_they_stand_are_told_apart(tmp_path):
    torch.save({"t": torch.ones(3, 4).T, "i": torch.ones(2, dtype=torch.int64)}, tmp_path / "a.pt")
    found = read_torch_file(tmp_path / "a.pt")
    assert found["t"].dtype == "F32, not contiguous" and found["i"].dtype == "torch.int64"


SAVED = {"param": torch.arange(40.0), "args": argparse.Namespace(a=[1, 2.5, None]), "b": {"c": "d"}}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_and_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    torch.save(SAVED, path)
    whole = bytearray(path.read_bytes())
    end = whole.index(b"byteorder") if data.draw(st.booleans()) else len(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.sampled_from([len(whole), len(whole) // 2]))])
    try:
        found = read_torch_file(path)
    except InputError as error:
        assert "damaged.pt: " in str(error) and "\n" not in str(error)
    else:
        assert isinstance(found, dict | Stored | list | str | int | float | None)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"param": torch.ones(3), "x": Malicious(mark)}, tmp_path / "bad.pt")
    for unread in ((), ("megatron.", "numpy.", "deepspeed.")):
        with pytest.raises(InputError, match=r"bad.pt: refused, it refers to posix.mkdir") as error:
            read_torch_file(tmp_path / "bad.pt", unread)
        assert "\n" not in str(error.value)
    assert not mark.exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert mark.exists(), "the file would not have done anything"


def test_files_of_the_old_form_are_not_even_opened(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Malicious(mark)))
    with pytest.raises(InputError, match=r"old.pt: not a complete torch.save file"):
        read_torch_file(tmp_path / "old.pt")
    torch.save({"x": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"old.pt: not a complete torch.save file"):
        read_torch_file(tmp_path / "old.pt")
    assert not mark.exists()


def test_objects_of_other_programs_are_neither_made_nor_imported(tmp_path, monkeypatch):
    module = types.ModuleType("megatron")
    kind = enum.Enum("Kind", ["auto"], module="megatron", qualname="Kind")
    module.Kind = kind
    monkeypatch.setitem(sys.modules, "megatron", module)
    value = {"args": argparse.Namespace(a=kind.auto, b=3), "rng": np.random.get_state()}
    torch.save(value, tmp_path / "a.pt")
    monkeypatch.delitem(sys.modules, "megatron")
    with pytest.raises(InputError, match=r"a.pt: refused, it refers to megatron.Kind, numpy"):
        read_torch_file(tmp_path / "a.pt")
    before = set(torch.serialization.get_safe_globals())
    found = read_torch_file(tmp_path / "a.pt", ("megatron.", "numpy."))
    assert isinstance(found["args"].a, Unread) and found["args"].b == 3
    assert "megatron" not in sys.modules and isinstance(found["rng"][1], Unread)
    assert set(torch.serialization.get_safe_globals()) == before


def test_files_that_are_damaged_or_packed_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(InputError, match=r"a.pt: no such file"):
        read_torch_file(path)
    torch.save({"x": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(InputError, match=r"a.pt: not a complete torch.save file"):
        read_torch_file(path)
    path.write_bytes(whole.replace(b"storage", b"stXrage"))
    with pytest.raises(InputError, match=r"a.pt: refused, it is damaged \(.*Bad CRC-32"):
        read_torch_file(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as one, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as other:
        for record in one.infolist():
            other.writestr(record.filename, one.read(record))
    with pytest.raises(InputError, match=r"b.pt: refused, .*is compressed"):
        read_torch_file(tmp_path / "b.pt")
