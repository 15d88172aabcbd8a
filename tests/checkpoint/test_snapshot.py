"""Snapshots: exact and pinned host memory, and copies that the next update waits for."""

import threading

import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.snapshot import Snapshot
from tests.helpers.logs import captured_logs

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ELEMENTS = 3 * 2**18 + 1
"""Just above a power of two in bytes, where torch's pinned allocator would take 4 MiB."""


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) for name, size in (("a", 7), ("b", 5))}


@pytest.mark.parametrize("reserved", [0, 12, 10**6], ids=["too little", "exact", "too much"])
def test_a_copy_stays_while_the_state_changes(reserved: int) -> None:
    snapshot = Snapshot(CPU)
    snapshot.reserve(reserved)
    first, second = state(1), state(2)
    copies = snapshot.copy(first)
    place = copies["a"].data_ptr()
    for name, tensor in first.items():
        kept = tensor.clone()
        tensor.zero_()
        assert torch.equal(copies[name], kept)
    again = snapshot.copy(second)
    assert again["a"].data_ptr() == place, "one buffer serves every save"
    assert all(torch.equal(again[name], tensor) for name, tensor in second.items())
    snapshot.release()
    larger = second | {"more": torch.ones(5)}
    assert all(torch.equal(t, larger[name]) for name, t in snapshot.copy(larger).items())
    assert snapshot.copy({}) == {}


def test_an_update_waits_for_the_copy_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, held, waited = Snapshot(CPU), threading.Event(), threading.Event()
    snapshot.wait()  # no copy is under way
    copy = Snapshot._copy

    def holding(self: Snapshot, *arguments: dict[str, Tensor]) -> None:
        assert held.wait(timeout=30)
        copy(self, *arguments)

    monkeypatch.setattr(Snapshot, "_copy", holding)
    snapshot.begin()
    copying = threading.Thread(target=snapshot.copy, args=(state(1),))
    waiting = threading.Thread(target=lambda: (snapshot.wait(), waited.set()))
    copying.start()
    waiting.start()
    assert not waited.wait(timeout=0.05)
    held.set()
    assert waited.wait(timeout=30)
    copying.join()
    waiting.join()


def test_a_failed_copy_does_not_hold_up_training(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot(CPU)
    monkeypatch.setattr(Snapshot, "_make", lambda self, elements: 1 / 0)
    snapshot.begin()
    with pytest.raises(ZeroDivisionError):
        snapshot.copy(state(1))
    snapshot.wait()


class FakeRuntime:
    """CUDA runtime of a machine without a GPU: pinned bytes by address."""

    def __init__(self, error: int = 0) -> None:
        self.pinned: dict[int, int] = {}
        self.calls: list[tuple[str, int]] = []
        self._error = error

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 1 and address not in self.pinned
        self.calls.append(("pin", size))
        if not self._error:
            self.pinned[address] = size
        return self._error

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unpin", self.pinned.pop(address)))
        return 0


def test_pinned_memory_has_the_exact_size_and_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    snapshot = Snapshot(GPU)
    for elements in (ELEMENTS, 2 * ELEMENTS):  # a growth releases the first
        snapshot.reserve(elements)
        snapshot.release()
    snapshot.reserve(ELEMENTS)
    snapshot.reserve(3 * ELEMENTS)  # a rebuilt stage without a release
    snapshot.release()
    sizes = [4 * factor * ELEMENTS for factor in (1, 2, 1, 3)]
    assert runtime.calls == [(name, size) for size in sizes for name in ("pin", "unpin")]
    assert runtime.pinned == {}


def test_memory_that_cannot_be_pinned_causes_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime(error=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    snapshot = Snapshot(GPU)
    with captured_logs() as messages:
        snapshot.reserve(ELEMENTS)
        snapshot.release()
    assert messages == [
        "cannot pin 3 MiB of host memory for checkpoints (CUDA error 2); saves delay training "
        "longer"
    ]
    assert [name for name, _ in runtime.calls] == ["pin"]
