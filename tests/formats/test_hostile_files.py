"""torch.save files that somebody else has made: no code, no memory or time beyond their size."""

import time
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import pytest

from megagrow.errors import InputError
from megagrow.formats import torch_file
from megagrow.formats.torch_file import read_torch_file

PROTO = b"\x80\x02"


def archive(path: Path, pickle: bytes, data: int = 8) -> Path:
    """A torch.save file with a given pickle and one storage of so many bytes."""
    with ZipFile(path, "w") as file:
        file.writestr(ZipInfo("a/data.pkl"), pickle)
        file.writestr(ZipInfo("a/byteorder"), b"little")
        file.writestr(ZipInfo("a/data/0"), bytes(data))
    return path


def laughs(levels: int) -> bytes:
    """Lists of ten references to the list below."""
    text = PROTO + b"]q\x00(" + b"K\x01" * 10 + b"e"
    for level in range(1, levels):
        text += b"]q" + bytes([level]) + b"(" + (b"h" + bytes([level - 1])) * 10 + b"e"
    return text + b"."


def nested_key(levels: int) -> bytes:
    """A dict whose key is a tuple of tuples: its hash takes 2 ** levels steps."""
    pairs = b"K\x00)q\x00"
    for n in range(levels):
        pairs += b"K\x00h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1])
    return PROTO + b"}(" + pairs + b"h" + bytes([levels]) + b"K\x01u."


def tensor(shape: bytes, strides: bytes, offset: bytes = b"K\x00", key: bytes = b"0") -> bytes:
    """A dict of one tensor of two floats."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\n"
    storage += b"X\x01\0\0\0" + key + b"X\x03\0\0\0cpuK\x02tQ"
    rest = b"\x89ccollections\nOrderedDict\n)RtR"
    name = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return PROTO + b"}X\x01\0\0\x00x" + name + storage + offset + shape + strides + rest + b"s."


LARGE = b"\x8a\x05\0\0\0\0\x01"
HOSTILE = {
    "billion laughs": (laughs(9), "more than 1000000 values"),
    "a key that hashes for years": (nested_key(60), "a key is of type list"),
    "a list in itself": (PROTO + b"]q\x00h\x00a.", "a value contains itself"),
    "deep": (PROTO + b"]" * 5000 + b"a" * 4999 + b".", "100 levels"),
    "many opcodes": (PROTO + b"N0" * 600_000 + b"N.", "more than 1000000 opcodes"),
    "a long integer": (PROTO + b"\x8b\xff\xff\xff\x7f" + b"\x01" * 99, "LONG4|long4"),
    "an opcode of newer protocols": (PROTO + b"\x8f\x90.", "opcode"),
    "no stack": (PROTO + b"0e.", "IndexError|opcode POP"),
    "another persistent id": (PROTO + b"K\x01Q.", "Only persistent_load of storage"),
    "no such storage": (
        tensor(b"K\x02\x85", b"K\x01\x85").replace(b"\x000X", b"\x007X"),
        "a/data/7",
    ),
    "larger than its storage": (tensor(b"K\x03\x85", b"K\x01\x85"), "a tensor of shape"),
    "behind its storage": (tensor(b"K\x02\x85", b"K\x01\x85", b"K\x01"), "a tensor of shape"),
    "larger than any disk": (
        tensor(LARGE * 2 + b"\x86", LARGE + b"K\x01\x86"),
        "a tensor of shape",
    ),
    "a negative size": (
        tensor(b"J\xfe\xff\xff\xff\x85", b"K\x01\x85"),
        "greater than or equal to 0",
    ),
    "a call of data": (PROTO + b"K\x01)R.", "int is called"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_is_refused_in_time_proportional_to_its_length(tmp_path: Path, name: str) -> None:
    pickle, message = HOSTILE[name]
    begin = time.perf_counter()
    with pytest.raises(InputError, match=rf"x\.pt: refused, it is damaged .*(?:{message})"):
        read_torch_file(archive(tmp_path / "x.pt", pickle))
    assert time.perf_counter() - begin < 10


def test_calls_that_allocate_memory_are_not_made(tmp_path: Path) -> None:
    """`bytearray(2 ** 40)` and `torch.Tensor(2 ** 40)`, which torch.load would call."""
    size = b"\x8a\x06\0\0\0\0\0\x01\x85R."
    for call in (b"cbuiltins\nbytearray\n", b"ctorch\nTensor\n"):
        found = read_torch_file(archive(tmp_path / "x.pt", PROTO + call + size))
        assert type(found).__name__ == "Unread"


def test_expanded_tensors_are_not_read_as_contiguous(tmp_path: Path) -> None:
    """All of 2 ** 40 elements of stride 0 are one number of the file."""
    path = archive(tmp_path / "x.pt", tensor(LARGE + b"\x85", b"K\x00\x85"))
    assert read_torch_file(path)["x"].dtype == "F32, not contiguous"


def test_the_directory_of_an_archive_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_file, "READ_BYTES", 100_000)
    path = tmp_path / "x.pt"
    with ZipFile(path, "w") as file:
        for number in range(2000):
            file.writestr(ZipInfo(f"a/data/{number}"), b"")
    with pytest.raises(InputError, match=r"x\.pt: refused, .*directory is larger than 100000"):
        read_torch_file(path)
    monkeypatch.setattr(torch_file, "READ_BYTES", 70_000)
    with pytest.raises(InputError, match=r"x\.pt: refused, .*pickle is larger than 70000"):
        read_torch_file(archive(path, PROTO + b"N0" * 40_000 + b"N."))
