"""Allocate a model's weights in the memory layout of its ZeRO stage, without duplicates."""

import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagrow.model.decoder import CausalLM, ModelChunk
from megagrow.parallel.context.ops import context_parallel_ops
from megagrow.parallel.engine_config import EngineSettings
from megagrow.parallel.pipeline.split import pipeline_split
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import ParamSpec, pad
from megagrow.parallel.shared_memory import on_one_host, shared_zeros
from megagrow.parallel.tensor_parallel import parallelize


def build_model(
    plan: dict[str, ParamSpec], settings: EngineSettings, topology: Topology, dtype: torch.dtype
) -> CausalLM:
    """Return this rank's chunks of layers, in tensor-parallel slices, on the meta device.

    `plan` is the complete model's `parameter_plan`.
    """
    split = pipeline_split(settings.model, settings.parallel)
    chunks = [
        ModelChunk(split.layers(chunk), chunk == 0, chunk == split.last_chunk)
        for chunk in split.chunks_of(topology.pp_rank)
    ]
    with torch.device("meta"):
        checkpointing = settings.parallel.activation_checkpointing
        ops = context_parallel_ops(settings.ops, topology, settings.parallel.cp_comm_type)
        model = CausalLM(settings.model, checkpointing, ops, chunks)
    parallelize(model.to(dtype), plan, topology, settings.parallel.sequence_parallel)
    return model


def materialize(
    model: CausalLM, device: torch.device, partition: Callable[[nn.Module], None] | None
) -> None:
    """Zero-fill the weights, or call `partition` on one layer after the other.

    Under ZeRO 3, `partition` splits the weights, so at most one full layer exists at a time and
    its memory is never touched.
    """
    make = torch.zeros if partition is None else torch.empty
    parts: list[nn.Module] = [*model.model.layers.values(), model]
    for part in parts:
        for parameter in part.parameters():
            if parameter.is_meta:
                shape, dtype = parameter.shape, parameter.dtype
                _give_memory(parameter, make(shape, dtype=dtype, device=device))
        if partition is not None:
            partition(part)


@dataclass(frozen=True)
class FlatWeights:
    """Forward weights of ZeRO 1 and 2: one flat tensor per optimizer group."""

    flats: list[Tensor]
    """(n,) each, padded to a multiple of two elements per data-parallel rank."""
    shared: bool
    """All data-parallel ranks map the same memory: a write of one rank changes all of them."""


def materialize_flat(
    model: CausalLM, groups: tuple[tuple[str, ...], ...], topology: Topology
) -> FlatWeights:
    """Zero-fill the weights as views of one flat tensor per optimizer group, for ZeRO 1 and 2.

    The ranks of one host share them: an all-gather of equal weights is a copy of one's own share.
    Collective.
    """
    named = dict(model.named_parameters())
    members = [[named[name] for name in names] for names in groups]
    sizes = [pad(sum(p.numel() for p in group), 2 * topology.dp) for group in members]
    dtype = next(iter(named.values())).dtype
    shared = topology.dp > 1 and on_one_host()
    if shared:
        own = sum(sizes) * dtype.itemsize if topology.dp_rank == 0 else 0
        first = topology.rank - topology.dp_rank * topology.tp
        (memory,) = shared_zeros(own, owners=[first])
        flats = list(memory.view(dtype).split(sizes))
    else:
        flats = [zeros(size, dtype, topology.device) for size in sizes]
    for group, flat in zip(members, flats, strict=True):
        _give_views(group, flat)
    return FlatWeights(flats, shared)


def _give_views(parameters: list[nn.Parameter], flat: Tensor) -> None:
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, flat[: sum(sizes)].split(sizes), strict=True):
        _give_memory(parameter, part.view(parameter.shape))


def _give_memory(parameter: nn.Parameter, memory: Tensor) -> None:
    """Give a parameter its memory, keeping the object identity (tied weights, attributes)."""
    real = nn.Parameter(memory)
    real.__dict__.update(parameter.__dict__ | real.__dict__)
    torch.utils.swap_tensors(parameter, real)


def zeros(numel: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return (numel,) zeros.

    On a CPU they are memory-mapped, in huge pages where available, and not touched: most of an
    empty engine is overwritten by initial weights, a checkpoint or a growth.
    """
    if torch.device(device).type != "cpu" or numel == 0:
        # Not torch.zeros, which calls this function while an engine is built.
        return torch.full((numel,), 0, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, numel * dtype.itemsize, flags=flags)
    with suppress(AttributeError, OSError):  # not Linux, or without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def zeros_like(tensor: Tensor) -> Tensor:
    """Return `zeros` with a tensor's shape, dtype and device."""
    return zeros(tensor.numel(), tensor.dtype, tensor.device).view(tensor.shape)
