"""The operations of a run's stages on the device at hand, by the backends that its config names."""

import torch

from megagrow.config.schema import RunConfig
from megagrow.model.backends import choose, work_of
from megagrow.model.machine import machine_of
from megagrow.model.ops import Ops, make_ops


def stage_ops(run: RunConfig, index: int, device: torch.device) -> Ops:
    """The operations of one stage. InputError, naming the key, where one cannot run here."""
    machine, work = machine_of(device), work_of(run, index, device)
    backends = choose(run.stages[index].kernels, machine, work, f"stages.{index}.kernels")
    return make_ops(backends, machine, work)


def check_kernels(run: RunConfig, device: torch.device) -> None:
    """Before time is spent: InputError if an operation of any stage cannot run here."""
    for index in range(len(run.stages)):
        stage_ops(run, index, device)
