"""Lets DeepSpeed build an engine whose weights are all zero, without touching memory for them.

Its state is written afterwards. Each part stands in for a function of DeepSpeed, within a context.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megagrow.parallel.deepspeed_import import deepspeed, stage3, stage_1_and_2
from megagrow.parallel.materialize import zeros


@contextmanager
def built_empty(flats: list[Tensor], device: torch.device) -> Iterator[None]:
    """For `deepspeed.initialize`. `flats` are the flat groups of ZeRO 1 and 2, in their order."""
    with _flat_already(flats), _empty_shares(device), _one_copy(), _mapped_zeros(), nothing_sent():
        yield


@contextmanager
def nothing_sent() -> Iterator[None]:
    """Keeps DeepSpeed from sending weights around.

    It sends those of the first rank to all others, and under ZeRO 3 makes every parameter whole
    once (to hang a hook on it, which needs no weights): all of them are zero everywhere.
    """

    def nothing(*_: Any, **__: Any) -> None:
        pass

    comm = deepspeed.comm
    with _replaced(comm, "broadcast", nothing), _replaced(comm, "all_gather_into_tensor", nothing):
        yield


@contextmanager
def _flat_already(flats: list[Tensor]) -> Iterator[None]:
    """Lets DeepSpeed take the flat groups of ZeRO 1 and 2 as they are.

    By itself it makes flat copies: the weights would be held twice while the engine is built.
    """
    original, waiting = stage_1_and_2._flatten_dense_tensors, list(flats)

    def flatten(tensors: list[Tensor]) -> Tensor:
        return waiting.pop(0) if waiting else original(tensors)

    with _replaced(stage_1_and_2, "_flatten_dense_tensors", flatten):
        yield


@contextmanager
def _empty_shares(device: torch.device) -> Iterator[None]:
    """Lets the ranks' shares of ZeRO 3 become one flat tensor of zeros.

    By itself DeepSpeed copies them into one, by way of the CPU, and collects the garbage of the
    whole program in between. An empty engine has nothing to copy.
    """

    def flat_zeros(shares: list[Tensor]) -> Tensor:
        sizes = [share.numel() for share in shares]
        flat = zeros(sum(sizes), shares[0].dtype, device)
        for share, part in zip(shares, flat.split(sizes), strict=True):
            part.__dict__.update(share.__dict__)
            torch.utils.swap_tensors(share, part)
        return flat

    with _replaced(stage3, "defragment", flat_zeros):
        yield


@contextmanager
def _one_copy() -> Iterator[None]:
    """Lets fp32 weights under ZeRO 3 be those of the forward pass and the optimizer's at once.

    DeepSpeed means them to be, but compares a device with the name of one (0.19.8), which are never
    equal, and copies. An offloaded optimizer has its own in any case.
    """
    zero3 = stage3.DeepSpeedZeroOptimizer_Stage3
    original = zero3._create_fp32_partitions

    def create(optimizer: Any) -> None:
        if not optimizer.offload_optimizer:
            optimizer.device = torch.device(optimizer.device)
        original(optimizer)

    with _replaced(zero3, "_create_fp32_partitions", create):
        yield


@contextmanager
def _mapped_zeros() -> Iterator[None]:
    """Lets the flat tensors of zeros that DeepSpeed makes, for gradients, be mapped ones."""
    original = torch.zeros

    def flat_zeros(*size: Any, **options: Any) -> Tensor:
        flat = len(size) == 1 and isinstance(size[0], int) and options.keys() == {"dtype", "device"}
        return zeros(size[0], **options) if flat else original(*size, **options)

    with _replaced(torch, "zeros", flat_zeros):
        yield


@contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)
