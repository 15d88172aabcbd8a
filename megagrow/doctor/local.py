"""What this machine has, and which backend computes each operation on it: `megagrow doctor`.

Nothing of training is imported, so that it speaks where a run could not even start.
"""

import platform
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megagrow.common.packages import package_version
from megagrow.common.sizes import format_in
from megagrow.common.tables import print_table
from megagrow.config.schema import RunConfig
from megagrow.model.backends import (
    OPERATIONS,
    KernelWorkload,
    automatic,
    backend_of,
    obstacle,
    work_of,
)
from megagrow.model.machine import Machine, machine_of

USUAL_HEAD_DIM = 128


class BackendRow(NamedTuple):
    """What is said of one backend of an operation."""

    operation: str
    backend: str
    why_not: str
    """Empty where it can run."""
    taken: str
    """Where it is the one that is taken; empty where it never is."""


def facts() -> dict[str, str]:
    """Programs and devices of this machine, each in words."""
    said = {
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, {_cuda()}",
        "GPUs": "; ".join(_gpus()) or "none that torch can use",
        "nccl": _nccl(),
    }
    packages = {"triton": "Triton", "flash-attn": "flash-attn", "deepspeed": "DeepSpeed"}
    said |= {
        name: package_version(package) or "not installed" for package, name in packages.items()
    }
    if torch.cuda.is_available():
        said["kernels"] = _checked(machine_of(torch.device("cuda")))
    if machine_of(torch.device("cpu")).interpreter:
        said["Triton"] += ", interpreted (TRITON_INTERPRET=1): for tests, very slow"
    return said


def usual_rows(machine: Machine) -> list[BackendRow]:
    """What is possible on a device in its usual precision, and when `auto` takes it."""
    dtype = torch.bfloat16 if machine.device == "cuda" else torch.float32
    cases = {
        "": KernelWorkload(dtype, USUAL_HEAD_DIM, packed=False),
        "for packed documents": KernelWorkload(dtype, USUAL_HEAD_DIM, packed=True),
    }
    return [
        BackendRow(operation, backend, _why_not(operation, backend, machine, cases[""]), taken)
        for operation, backends in OPERATIONS.items()
        for backend in backends
        for taken in [_taken(operation, backend, machine, cases)]
    ]


def run_rows(run: RunConfig, index: int, device: torch.device) -> list[BackendRow]:
    """The same for a stage of a run, whose config may name backends."""
    machine, work = machine_of(device), work_of(run, index, device)
    config, rows = run.stages[index].kernels, []
    for operation, backends in OPERATIONS.items():
        asked = getattr(config, operation)
        chosen = backend_of(operation, config, machine, work)
        for backend in backends:
            why_not = _why_not(operation, backend, machine, work)
            taken = "refused: the run would not start" if why_not else f"yes ({asked})"
            rows.append(BackendRow(operation, backend, why_not, taken if backend == chosen else ""))
    return rows


def show_doctor(run: RunConfig | None, device: torch.device, console: Console) -> None:
    """Prints what this machine has, then the backends: of each stage of a run, or in general."""
    found = Table.grid(padding=(0, 2))
    for name, said in facts().items():
        found.add_row(Text(name), Text(said))
    console.print(found)
    if run is None:
        taken = f"auto takes it (head_dim {USUAL_HEAD_DIM})"
        _print_rows(console, str(device), taken, usual_rows(machine_of(device)))
        return
    for index, stage in enumerate(run.stages):
        work = work_of(run, index, device)
        packed = "packed documents" if work.packed else "whole sequences"
        numbers = str(work.dtype).removeprefix("torch.")
        title = f"stage {index} on {device}: {numbers}, head_dim {stage.model.head_dim}, {packed}"
        _print_rows(console, title, "taken", run_rows(run, index, device))


def _print_rows(console: Console, title: str, taken: str, rows: list[BackendRow]) -> None:
    cells, before = [], ""
    for row in rows:
        operation = "" if row.operation == before else row.operation
        possible = f"no: {row.why_not}" if row.why_not else "yes"
        cells.append((operation, row.backend, possible, row.taken))
        before = row.operation
    print_table(console, ("operation", "backend", "possible", taken), cells, title=title)


def _taken(operation: str, backend: str, machine: Machine, cases: dict[str, KernelWorkload]) -> str:
    """In which of the cases `auto` takes a backend: `yes` where it is in all of them."""
    within = [
        case for case, work in cases.items() if automatic(operation, machine, work) == backend
    ]
    if len(within) == len(cases):
        return "yes"
    return " and ".join(case or "without documents" for case in within)


def _why_not(operation: str, backend: str, machine: Machine, work: KernelWorkload) -> str:
    return obstacle(operation, backend, machine, work) or ""


def _checked(machine: Machine) -> str:
    if machine.checked:
        return f"checked on sm_{machine.capability}"
    return (
        f"not checked on sm_{machine.capability}: auto passes over Triton's, which may be named; "
        "tools/gpu/gpu_check.py checks them"
    )


def _cuda() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in this build"


def _gpus() -> Iterator[str]:
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        gib = format_in(torch.cuda.get_device_properties(index).total_memory, "GiB", 0)
        yield f"{torch.cuda.get_device_name(index)} (sm_{major}{minor}, {gib} GiB)"


def _nccl() -> str:
    if not (dist.is_available() and dist.is_nccl_available()):
        return "not in this build of torch"
    return ".".join(map(str, torch.cuda.nccl.version()))
