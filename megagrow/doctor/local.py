"""Report of the local machine and of the kernel backends selected on it: `megagrow doctor`.

No training engine is imported, so the report also works where a run cannot start.
"""

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console

from megagrow.common.sizes import format_in
from megagrow.common.tables import print_facts, print_lines, print_table
from megagrow.config.schema import RunConfig
from megagrow.model.backends import (
    CHECKED_CODE,
    OPERATIONS,
    KernelWorkload,
    automatic,
    backend_of,
    kernel_workload,
    obstacle,
)
from megagrow.model.machine import Machine, machine_of
from megagrow.train.kernel_calls import Checks
from megagrow.train.kernel_selection import check_host, determinism_problems, stage_machine
from megagrow.train.reporting.run_files import package_version

DEFAULT_HEAD_DIM, DEFAULT_TAPS = 128, 4


class BackendRow(NamedTuple):
    """One backend of an operation in the report."""

    operation: str
    backend: str
    why_not: str
    """Reason why it is not available; empty if it is."""
    selected: str
    """When it is selected; empty if it never is."""


def environment_facts() -> dict[str, str]:
    """Return versions and devices of this machine as text, by name."""
    facts = {
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, {_cuda()}",
        "GPUs": "; ".join(_gpus()) or "none available to torch",
        "nccl": _nccl(),
    }
    packages = {"triton": "Triton", "deepspeed": "DeepSpeed"}
    packages |= {name: name for name in ("flash-attn", "mamba-ssm", "causal-conv1d")}
    facts |= {
        name: package_version(package) or "not installed" for package, name in packages.items()
    }
    if torch.cuda.is_available():
        capability = machine_of(torch.device("cuda")).capability
        facts["kernels"] = kernel_checks(capability, facts["Triton"])
    if machine_of(torch.device("cpu")).interpreter:
        facts["Triton"] += ", interpreted (TRITON_INTERPRET=1): for tests, very slow"
    return facts


def kernel_checks(capability: int, triton: str) -> str:
    """Return which checks of the Triton kernels cover a GPU and a version of Triton."""
    checked = "checked" if capability in CHECKED_CODE.get(triton, ()) else "not checked"
    return (
        f"code {checked} for sm_{capability} with Triton {triton} (checked versions: "
        f"{', '.join(CHECKED_CODE)}); results are checked at the start of a run, and now with --run"
    )


def default_rows(machine: Machine) -> list[BackendRow]:
    """Return the backends of a device at its default precision and when `auto` selects each.

    On a GPU, the rows assume that the Triton kernels pass the self-check of a run.
    """
    if machine.device == "cuda":
        machine = replace(machine, checks=dict.fromkeys(OPERATIONS))
    dtype = torch.bfloat16 if machine.device == "cuda" else torch.float32
    cases = {
        name: KernelWorkload(dtype, DEFAULT_HEAD_DIM, packed, conv_taps=DEFAULT_TAPS)
        for name, packed in (("", False), ("for packed documents", True))
    }
    return [
        BackendRow(operation, backend, _why_not(operation, backend, machine, cases[""]), selected)
        for operation, backends in OPERATIONS.items()
        for backend in backends
        for selected in [_selected_when(operation, backend, machine, cases)]
    ]


def stage_rows(
    run: RunConfig, index: int, device: torch.device, checks: Checks
) -> list[BackendRow]:
    """Return the backends for a stage of a run, whose config may select backends by name."""
    machine, work = stage_machine(run, index, device, checks), kernel_workload(run, index, device)
    config, rows = run.stages[index].kernels, []
    for operation, backends in OPERATIONS.items():
        setting = getattr(config, operation)
        chosen = backend_of(operation, config, machine, work)
        for backend in backends:
            why_not = _why_not(operation, backend, machine, work)
            selected = ""
            if backend == chosen:
                selected = "not available: the run cannot start" if why_not else f"yes ({setting})"
            rows.append(BackendRow(operation, backend, why_not, selected))
    return rows


@dataclass(frozen=True)
class LocalReport:
    """Report of this machine, for a run or in general."""

    run: RunConfig | None
    device: torch.device
    facts: dict[str, str]
    problems: list[str]
    """Settings of the run that the device does not support."""
    rows: list[list[BackendRow]]
    """Backends of each stage, or one list without a run."""


def examine_machine(run: RunConfig | None, device: torch.device) -> LocalReport:
    """Return the report. On a GPU, the Triton kernels of a run are checked first."""
    facts = environment_facts()
    if run is None:
        return LocalReport(run, device, facts, [], [default_rows(machine_of(device))])
    problems, checks = determinism_problems(run, device), check_host(run, device)
    rows = [stage_rows(run, index, device, checks) for index in range(len(run.stages))]
    return LocalReport(run, device, facts, problems, rows)


def local_document(report: LocalReport) -> dict[str, Any]:
    """Return the report as JSON values; `stage` is null without a run."""
    return {
        "device": str(report.device),
        "environment": {
            name.lower().replace("-", "_"): fact for name, fact in report.facts.items()
        },
        "problems": report.problems,
        "backends": [
            {
                "stage": None if report.run is None else index,
                "operation": row.operation,
                "backend": row.backend,
                "available": not row.why_not,
                "reason": row.why_not or None,
                "selected": row.selected or None,
            }
            for index, rows in enumerate(report.rows)
            for row in rows
        ],
    }


def print_local_report(report: LocalReport, console: Console) -> None:
    """Print the facts of this machine and the backends."""
    print_facts(console, report.facts.items())
    print_lines(console, (f"Problem: {problem}" for problem in report.problems))
    for index, rows in enumerate(report.rows):
        title, selected = str(report.device), f"selected by auto (head_dim {DEFAULT_HEAD_DIM})"
        if report.run is not None:
            title, selected = _stage_title(report.run, index, report.device), "selected"
        _print_rows(console, title, selected, rows)


def _stage_title(run: RunConfig, index: int, device: torch.device) -> str:
    work = kernel_workload(run, index, device)
    packed = "packed documents" if work.packed else "full sequences"
    packed += ", sliding window" if work.windowed else ""
    dtype, head_dim = str(work.dtype).removeprefix("torch."), run.stages[index].model.head_dim
    return f"stage {index} on {device}: {dtype}, head_dim {head_dim}, {packed}"


def _print_rows(console: Console, title: str, selected: str, rows: list[BackendRow]) -> None:
    cells, previous = [], ""
    for row in rows:
        operation = "" if row.operation == previous else row.operation
        available = f"no: {row.why_not}" if row.why_not else "yes"
        cells.append((operation, row.backend, available, row.selected))
        previous = row.operation
    print_table(console, ("operation", "backend", "available", selected), cells, title=title)


def _selected_when(
    operation: str, backend: str, machine: Machine, cases: dict[str, KernelWorkload]
) -> str:
    """Return the cases in which `auto` selects a backend; `yes` if in all cases."""
    selected = [
        case for case, work in cases.items() if automatic(operation, machine, work) == backend
    ]
    if len(selected) == len(cases):
        return "yes"
    return " and ".join(case or "without documents" for case in selected)


def _why_not(operation: str, backend: str, machine: Machine, work: KernelWorkload) -> str:
    return obstacle(operation, backend, machine, work) or ""


def _cuda() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in this build"


def _gpus() -> Iterator[str]:
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        gib = format_in(torch.cuda.get_device_properties(index).total_memory, "GiB", 0)
        yield f"{torch.cuda.get_device_name(index)} (sm_{major}{minor}, {gib} GiB)"


def _nccl() -> str:
    if not (dist.is_available() and dist.is_nccl_available()):
        return "not available in this build of torch"
    return ".".join(map(str, torch.cuda.nccl.version()))
