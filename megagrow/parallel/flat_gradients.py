"""Gradients of ZeRO 1 and 2 in fp32, summed up where the optimizer takes them from.

DeepSpeed (0.19.8) does so where gradients are bf16 and their sum is fp32: what was reduced is added
to one flat tensor per group, this rank's part. Where both are fp32 it copies every gradient twice
more, into a tensor that holds them in the order of the backward pass, and at the update into a flat
one. Here fp32 goes the way of bf16: the same sums in the same order, less memory, fewer copies.
"""

from typing import Any

import torch


def sum_flat(optimizer: Any) -> None:
    """For DeepSpeed's optimizer of ZeRO 1 and 2 that is not offloaded, once, when it is built.

    On a CPU the flat tensors are kept from step to step: there new memory costs more than a sum.
    """
    optimizer._use_compact_grad_partition_buffer = lambda group: True
    if optimizer.single_partition_of_fp32_groups[0].device.type != "cpu":
        return
    build, built = optimizer._build_compact_grad_partition_buffer, {}

    def cleared(group: int) -> list[torch.Tensor]:
        if group not in built:
            built[group] = build(group)
        else:
            built[group].flat_partition.zero_()
        return built[group]

    optimizer._build_compact_grad_partition_buffer = cleared
