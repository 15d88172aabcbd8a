"""The simulated device: it counts what it is shown, and refuses to mix host and device."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megagrow.simulation.device import register
from megagrow.simulation.isolated import isolated
from megagrow.simulation.patches import patched
from megagrow.simulation.recorder import Recorder

MIB = 2**20


def everything() -> dict[str, object]:
    """Waits by operation, copies by pinned memory, peak and rest of memory, and the error."""
    recorder = Recorder()
    device = register(recorder.usage, recorder.wait)
    with patched(recorder), FakeTensorMode(allow_non_fake_inputs=True), recorder:
        recorder.begin("reads")
        read(device)
        recorder.begin("copies")
        copy(device)
        recorder.begin("memory")
        before = recorder.memory.current
        allocate(device)
        with pytest.raises(RuntimeError, match="same device"):
            torch.zeros(4, device=device).add_(torch.zeros(4))
    waits, copies = Counter[str](), Counter[bool]()
    for wait, count in recorder.waits.items():
        waits[wait.operation] += count
    for each, count in recorder.copies.items():
        copies[each.pinned] += count if each.section == "copies" else 0
    memory = recorder.memory
    peak = memory.peaks["memory"].size - before
    return {"waits": waits, "copies": copies, "peak": peak, "rest": memory.current - before}


def read(device: torch.device) -> None:
    values = torch.tensor([3, 4], device=device)
    assert values.tolist() == [3, 4]  # from the host, so that the simulation knows them
    unknown = torch.ones(2, device=device).sum()
    assert float(unknown) == 1.0
    assert not bool(unknown > 0)
    unknown.cpu()
    torch.get_device_module(device).synchronize(device)


def copy(device: torch.device) -> None:
    torch.zeros(4).to(device)
    torch.empty(4, pin_memory=True).to(device)
    torch.zeros(4).pin_memory().to(device, non_blocking=True)
    torch.empty(4, device=device).add_(torch.empty(4, device=device))


def allocate(device: torch.device) -> None:
    first = torch.empty(2 * MIB, dtype=torch.uint8, device=device)
    second = first.view(torch.int32)[:10].float()  # 40 bytes, rounded up to 512
    del first
    third = torch.empty(MIB, dtype=torch.uint8, device=device)
    del second, third


def test_waits_copies_memory_and_mixing() -> None:
    assert isolated(everything) == {
        "waits": {"tolist": 1, "item": 2, "copy to host": 1, "synchronize": 1},
        "copies": {False: 1, True: 2},
        "peak": 2 * MIB + 512,  # a storage counts once, and until its release
        "rest": 0,
    }


def test_nothing_is_replaced_afterwards() -> None:
    before = torch.tensor, torch.nn.functional.rms_norm, torch.utils.swap_tensors
    with patched(Recorder()):
        assert torch.tensor is not before[0]
    assert (torch.tensor, torch.nn.functional.rms_norm, torch.utils.swap_tensors) == before
