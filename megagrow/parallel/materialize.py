"""Gives a model its weights' memory, laid out as its ZeRO stage keeps it; none is held twice."""

import mmap
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from megagrow.model.llama import LlamaForCausalLM
from megagrow.parallel.engine_config import EngineSettings
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import ParamSpec, pad
from megagrow.parallel.tensor_parallel import parallelize


def build_model(
    plan: dict[str, ParamSpec], settings: EngineSettings, topology: Topology, dtype: torch.dtype
) -> LlamaForCausalLM:
    """This rank's tensor-parallel share of the model, still without memory."""
    with torch.device("meta"):
        recompute = settings.parallel.activation_checkpointing
        model = LlamaForCausalLM(settings.model, recompute, settings.ops)
    parallelize(model.to(dtype), plan, topology, settings.parallel.sequence_parallel)
    return model


def materialise(
    model: LlamaForCausalLM, device: torch.device, partition: Callable[[nn.Module], None] | None
) -> None:
    """Zero-fills the weights, or calls `partition` on one layer after the other.

    Under ZeRO-3 that splits them, so no more than one layer is ever whole, and none is touched.
    """
    make = torch.zeros if partition is None else torch.empty
    parts: list[nn.Module] = [*model.model.layers, model]
    for part in parts:
        for parameter in part.parameters():
            if parameter.is_meta:
                shape, dtype = parameter.shape, parameter.dtype
                _give_memory(parameter, make(shape, dtype=dtype, device=device))
        if partition is not None:
            partition(part)


def materialise_flat(
    model: LlamaForCausalLM, groups: tuple[tuple[str, ...], ...], topology: Topology
) -> list[Tensor]:
    """Zero-fills the weights as views of one flat tensor per optimizer group, as ZeRO 1 and 2 keep
    them. Returns those, each padded to two elements per data-parallel rank."""
    named = dict(model.named_parameters())
    return [_flat_group([named[name] for name in names], topology) for names in groups]


def _flat_group(parameters: list[nn.Parameter], topology: Topology) -> Tensor:
    sizes = [parameter.numel() for parameter in parameters]
    padded = pad(sum(sizes), 2 * topology.dp)
    flat = zeros(padded, parameters[0].dtype, topology.device)
    for parameter, part in zip(parameters, flat[: sum(sizes)].split(sizes), strict=True):
        _give_memory(parameter, part.view(parameter.shape))
    return flat


def _give_memory(parameter: nn.Parameter, memory: Tensor) -> None:
    """The parameter stays the same object (tied weights, marks)."""
    real = nn.Parameter(memory)
    real.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, real)


def zeros(numel: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """(numel,) zeros.

    On a CPU they are mapped, in huge pages where the system has them, and not filled: most of what
    an empty engine holds is written over by initial weights, a checkpoint or a growth.
    """
    if torch.device(device).type != "cpu" or numel == 0:
        # Not torch.zeros: while an engine is built, that one ends up here.
        return torch.full((numel,), 0, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, numel * dtype.itemsize, flags=flags)
    with suppress(AttributeError, OSError):  # another system than Linux, or Linux without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros of a tensor's shape, dtype and device."""
    return zeros(tensor.numel(), tensor.dtype, tensor.device).view(tensor.shape)
