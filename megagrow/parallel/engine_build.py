"""Build DeepSpeed engines with zero weights, without touching memory for them.

The state is written afterwards. Each context replaces one function or class of DeepSpeed or torch.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.parallel.deepspeed_import import (
    deepspeed,
    deepspeed_engine,
    deepspeed_groups,
    stage3,
    stage_1_and_2,
)
from megagrow.parallel.flat_optimizer import FlatOptimizer
from megagrow.parallel.materialize import zeros, zeros_like


@contextmanager
def built_empty(
    flats: list[Tensor], device: torch.device, secondary: dist.ProcessGroup | None
) -> Iterator[None]:
    """Context for `deepspeed.initialize`.

    Args:
        flats: the flat groups of ZeRO 1 and 2, in order.
        device: device of this rank.
        secondary: ranks that shard a second copy of the forward weights under ZeRO 3.
    """
    with (
        replaced(deepspeed_engine, "DeepSpeedZeroOptimizer", FlatOptimizer),
        secondary_group(secondary),
        _flat_groups(flats),
        _untouched_masters(flats),
        _empty_partitions(device),
        _shared_fp32_weights(),
        _mapped_zeros(),
        no_weight_broadcast(),
    ):
        yield


def secondary_group(group: dist.ProcessGroup | None) -> AbstractContextManager[None]:
    """Give DeepSpeed the group of hpZ.

    DeepSpeed has one for the process, of consecutive ranks: with tensor parallelism they hold
    different slices.
    """
    return replaced(deepspeed_groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", group)


@contextmanager
def no_weight_broadcast() -> Iterator[None]:
    """Keep DeepSpeed from sending weights between ranks.

    It broadcasts the weights of the first rank, and under ZeRO 3 gathers every parameter once to
    register a hook. All weights are zero on all ranks, so neither is needed.
    """

    def nothing(*_: Any, **__: Any) -> None:
        pass

    comm = deepspeed.comm
    with replaced(comm, "broadcast", nothing), replaced(comm, "all_gather_into_tensor", nothing):
        yield


@contextmanager
def _flat_groups(flats: list[Tensor]) -> Iterator[None]:
    """Make DeepSpeed use the given flat groups of ZeRO 1 and 2.

    By default DeepSpeed flattens into copies, so two copies of the weights exist during the build.
    """
    original, waiting = stage_1_and_2._flatten_dense_tensors, list(flats)

    def flatten(tensors: list[Tensor]) -> Tensor:
        return waiting.pop(0) if waiting else original(tensors)

    with replaced(stage_1_and_2, "_flatten_dense_tensors", flatten):
        yield


@contextmanager
def _untouched_masters(flats: list[Tensor]) -> Iterator[None]:
    """Make the fp32 weights of ZeRO 1 and 2, clones of parts of the flat groups, mapped zeros.

    A copy of the zeros would touch the memory of both.
    """
    original, storages = torch.Tensor.clone, {flat.untyped_storage()._cdata for flat in flats}

    def clone(tensor: Tensor, **options: Any) -> Tensor:
        part_of_flat = tensor.untyped_storage()._cdata in storages
        return zeros_like(tensor) if part_of_flat else original(tensor, **options)

    with replaced(torch.Tensor, "clone", clone):
        yield


@contextmanager
def _empty_partitions(device: torch.device) -> Iterator[None]:
    """Make a rank's ZeRO-3 partitions views of one flat tensor of zeros.

    By default DeepSpeed copies them into one through the CPU and runs a full garbage collection
    in between. An empty engine has nothing to copy.
    """

    def flat_zeros(partitions: list[Tensor]) -> Tensor:
        sizes = [partition.numel() for partition in partitions]
        flat = zeros(sum(sizes), partitions[0].dtype, device)
        for partition, part in zip(partitions, flat.split(sizes), strict=True):
            part.__dict__.update(partition.__dict__ | part.__dict__)
            torch.utils.swap_tensors(partition, part)
        return flat

    with replaced(stage3, "defragment", flat_zeros):
        yield


@contextmanager
def _shared_fp32_weights() -> Iterator[None]:
    """Share fp32 weights between forward pass and optimizer under ZeRO 3.

    DeepSpeed is meant to share them, but 0.19.8 compares a device with a device name, which are
    never equal, and copies. An offloaded optimizer has separate weights in any case.
    """
    zero3 = stage3.DeepSpeedZeroOptimizer_Stage3
    original = zero3._create_fp32_partitions

    def create(optimizer: Any) -> None:
        if not optimizer.offload_optimizer:
            optimizer.device = torch.device(optimizer.device)
        original(optimizer)

    with replaced(zero3, "_create_fp32_partitions", create):
        yield


@contextmanager
def _mapped_zeros() -> Iterator[None]:
    """Make DeepSpeed's flat gradient buffers memory-mapped zeros."""
    original = torch.zeros

    def flat_zeros(*size: Any, **options: Any) -> Tensor:
        flat = len(size) == 1 and isinstance(size[0], int) and options.keys() == {"dtype", "device"}
        return zeros(size[0], **options) if flat else original(*size, **options)

    with replaced(torch, "zeros", flat_zeros):
        yield


@contextmanager
def replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Replace an attribute of a module or object."""
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)
