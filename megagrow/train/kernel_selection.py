"""Kernel backends of the stages of a run, which all ranks agree on before the run starts.

On GPUs, Triton kernels are used only if their self-check passes: `auto` selects torch instead, and
a stage that names the backend `triton` is an error. Runs on CPUs check nothing.
"""

import logging
import socket
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from megagrow.config.schema import RunConfig
from megagrow.errors import ConfigError
from megagrow.model.backends import (
    OPERATIONS,
    Backends,
    KernelWorkload,
    backend_of,
    choose,
    kernel_workload,
    obstacle,
)
from megagrow.model.machine import Machine, machine_of
from megagrow.model.ops import Ops, make_ops
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.launch import Launch
from megagrow.train.determinism import deterministic_conflicts
from megagrow.train.kernel_calls import NO_CHECKS, OPERATION_OF, Checks, KernelCall, stage_kernels
from megagrow.train.kernel_check import check_calls

logger = logging.getLogger(__name__)


class SelectedBackends(NamedTuple):
    """Backends of a stage, and the properties that determine them."""

    backends: Backends
    machine: Machine
    work: KernelWorkload


def check_kernels(run: RunConfig, device: torch.device, launch: Launch) -> Checks:
    """Check the Triton kernels of all stages, and that every operation can run. Collective.

    The first rank of each host checks its GPU. A kernel that fails on one host is used on none.
    Warns on rank 0 if `auto` cannot use a kernel. Raises ResourceError on all ranks if an operation
    of any stage cannot run, and ConfigError if the environment contradicts `deterministic_mode`.
    Returns the results, equal on all ranks; empty on CPUs.
    """
    checks = NO_CHECKS
    if device.type == "cuda":
        found = check_host(run, device) if launch.local_rank == 0 else None
        gathered: list[Checks | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, found)
        checks = agreed_checks(checks for checks in gathered if checks is not None)
        if launch.rank == 0:
            for warning in fallback_warnings(run, device, checks):
                logger.warning("%s", warning)
    run_on_all_ranks(lambda: _check_stages(run, device, checks))
    return checks


def _check_stages(run: RunConfig, device: torch.device, checks: Checks) -> None:
    if conflicts := determinism_problems(run, device):
        raise ConfigError("; ".join(conflicts))
    for index in range(len(run.stages)):
        stage_ops(run, index, device, checks)


def determinism_problems(run: RunConfig, device: torch.device) -> list[str]:
    """Return the reasons why the environment prevents deterministic results that a run requires."""
    required = run.deterministic_mode and device.type == "cuda"
    return deterministic_conflicts() if required else []


def check_host(run: RunConfig, device: torch.device) -> Checks:
    """Check the Triton calls that a run uses on one GPU if all self-checks pass."""
    calls = (call for index in range(len(run.stages)) for call in _candidates(run, index, device))
    distinct = tuple(dict.fromkeys(calls))
    checks = check_calls(distinct, device, machine_of(device).capability) if distinct else {}
    host = socket.gethostname()
    return {call: reason and f"{reason} on {host}" for call, reason in checks.items()}


def agreed_checks(hosts: Iterable[Checks]) -> Checks:
    """Merge the results of several hosts: a call passes if it passes on all of them."""
    results = list(hosts)
    agreed: dict[KernelCall, str | None] = {}
    for call in dict.fromkeys(call for checks in results for call in checks):
        reasons = [checks.get(call, f"a host cannot run {call}") for checks in results]
        agreed[call] = next((reason for reason in reasons if reason is not None), None)
    return agreed


def select_backends(
    run: RunConfig, index: int, device: torch.device, checks: Checks
) -> SelectedBackends:
    """Return the backends of one stage. Raises ResourceError if one cannot run here."""
    machine, work = stage_machine(run, index, device, checks), kernel_workload(run, index, device)
    backends = choose(run.stages[index].kernels, machine, work, f"stages.{index}.kernels")
    return SelectedBackends(backends, machine, work)


def stage_ops(run: RunConfig, index: int, device: torch.device, checks: Checks) -> Ops:
    """Return the operations of one stage. Raises ResourceError if one cannot run here."""
    return make_ops(*select_backends(run, index, device, checks))


def triton_calls(run: RunConfig, index: int, selected: SelectedBackends) -> tuple[KernelCall, ...]:
    """Return the Triton calls of a stage with the selected backends."""
    return stage_kernels(run.stages[index], selected.work.dtype, selected.backends)


def stage_machine(run: RunConfig, index: int, device: torch.device, checks: Checks) -> Machine:
    """Return the machine with the results of the self-check for the calls of one stage."""
    by_operation = _by_operation(_candidates(run, index, device), checks)
    return replace(machine_of(device), checks=by_operation)


def _by_operation(calls: Iterable[KernelCall], checks: Checks) -> dict[str, str | None]:
    """Return the first failure of each operation, None if its calls passed; without unchecked."""
    found: dict[str, str | None] = {}
    unchecked = set()
    for call in calls:
        operation = OPERATION_OF[call.op]
        if call in checks:
            found[operation] = found.get(operation) or checks[call]
        else:
            unchecked.add(operation)
    return {name: reason for name, reason in found.items() if name not in unchecked}


def _candidates(run: RunConfig, index: int, device: torch.device) -> tuple[KernelCall, ...]:
    """Return the Triton calls of a stage if all self-checks pass; none on a CPU."""
    if device.type != "cuda":
        return ()
    config, work = run.stages[index].kernels, kernel_workload(run, index, device)
    machine = replace(machine_of(device), checks=dict.fromkeys(OPERATIONS))
    names = {
        name: "" if obstacle(name, backend, machine, work) else backend
        for name in OPERATIONS
        for backend in [backend_of(name, config, machine, work)]
    }
    return triton_calls(run, index, SelectedBackends(Backends(**names), machine, work))


def fallback_warnings(run: RunConfig, device: torch.device, checks: Checks) -> list[str]:
    """Return a message for each failed check because of which `auto` selects another backend.

    A failure is reported for the first stage only.
    """
    messages: dict[str, str] = {}
    for index, stage in enumerate(run.stages):
        machine = stage_machine(run, index, device, checks)
        work = kernel_workload(run, index, device)
        for operation, reason in machine.checks.items():
            if reason is not None and getattr(stage.kernels, operation) == "auto":
                backend = backend_of(operation, stage.kernels, machine, work)
                key = f"stages.{index}.kernels.{operation}"
                messages.setdefault(reason, f"{key} = auto selects {backend}: {reason}")
    return list(messages.values())
