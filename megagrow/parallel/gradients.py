"""The global gradient norm in which each optimizer group has a weight.

norm^2 = sum over groups of weight * |g|^2: reported, and clipped by. With the weights k_out / k_in
a grown model's norm is that of its source (docs/reference/operators.md). A parameter that every
tensor-parallel rank has whole is counted once.

DeepSpeed's optimizers have no such weights. Each is given them on its instance, at the one method
between its gradients and its global norm.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.parallel.deepspeed_import import BF16_Optimizer, combine_grad_norm_groups
from megagrow.parallel.process_groups import Topology


def weigh_norm(optimizer: Any, zero_stage: int, weights: Sequence[float]) -> None:
    """Gives a ZeRO 1, 2 or 3 optimizer of DeepSpeed the weights of its groups, in their order."""
    if all(weight == 1 for weight in weights):
        return
    if zero_stage == 3:
        optimizer._get_norm_groups = _zero3(optimizer, optimizer._get_norm_groups, weights)
    elif isinstance(optimizer, BF16_Optimizer):  # DeepSpeed's choice for ZeRO 1 in bf16
        optimizer.get_grads_for_norm = _bf16(optimizer, optimizer.get_grads_for_norm, weights)
    else:
        optimizer.scaled_global_norm = _flat(optimizer, weights)


def _zero3(optimizer: Any, norms: Callable[[], list[Any]], weights: Sequence[float]) -> Any:
    """Norms of sub-groups: the pieces of a group that are updated one after the other."""

    def weighted() -> list[Any]:
        group_of = optimizer.sub_group_to_group_id
        return [norm * weights[group_of[index]] ** 0.5 for index, norm in enumerate(norms())]

    return weighted


def _bf16(optimizer: Any, gradients: Callable[..., Any], weights: Sequence[float]) -> Any:
    """In place of each gradient its weighted norm: of a single number, the norm is that number."""
    weight_of = {
        id(gradient): weight
        for weight, group in zip(weights, optimizer.fp32_groups_gradients, strict=True)
        for gradient in group
    }

    def weighted(for_clipping: bool = False) -> Any:
        if for_clipping:
            return gradients(for_clipping=True)
        dense, experts = gradients()
        norms = [g.detach().float().norm() * weight_of[id(g)] ** 0.5 for g in dense]
        return norms, experts

    return weighted


def _flat(optimizer: Any, weights: Sequence[float]) -> Any:
    """DeepSpeed's own sum over groups, with weights. A norm that is not finite is below zero."""

    def weighted(norm_type: int = 2) -> Tensor:
        norms = []
        for index, weight in enumerate(weights):
            here = optimizer.params_in_partition[index]
            if optimizer.cpu_offload:
                norm = optimizer.complete_grad_norm_calculation_for_cpu_offload(here)
            else:
                norm = optimizer.get_grad_norm_direct(optimizer.averaged_gradients[index], here)
            norms.append(norm * weight**0.5)
        return combine_grad_norm_groups(norms, norm_type=norm_type)

    return weighted


def clip_whole_gradients(
    groups: Sequence[tuple[Sequence[Any], float]], limit: float, topology: Topology
) -> Tensor:
    """ZeRO 0: clips the gradients of (parameters, weight) groups in place; returns their norm.

    Every data-parallel rank has the same whole gradients. A `limit` of 0 is none.
    """
    squares = torch.zeros((), device=topology.device)
    for parameters, weight in groups:
        mine = [p for p in parameters if topology.tp_rank == 0 or p.model_parallel]
        norms = [p.grad.detach().float().norm() for p in mine]
        if norms:
            squares += weight * torch.stack(norms).square().sum()
    dist.all_reduce(squares, group=topology.tp_group)
    norm = squares.sqrt()
    if limit:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for parameters, _ in groups:
            for parameter in parameters:
                parameter.grad.mul_(factor)
    return norm


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
