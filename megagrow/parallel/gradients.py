"""Global gradient norm with a weight per optimizer group, and gradient accumulation buffers.

norm^2 = sum over groups of weight * |g|^2, reported and used for clipping. With the weights
k_out / k_in a grown model's norm equals that of its source (docs/reference/operators.md). A
parameter replicated on all tensor-parallel ranks is counted once.

DeepSpeed's optimizers have no such weights. `set_norm_weights` adds them per instance, by replacing
the one method that turns gradients into norms.

`reuse_flat_gradients` makes ZeRO 1 and 2 accumulate gradients directly in flat tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.parallel.deepspeed_import import BF16_Optimizer, combine_grad_norm_groups
from megagrow.parallel.process_groups import Topology


def set_norm_weights(optimizer: Any, zero_stage: int, weights: Sequence[float]) -> None:
    """Set the group weights of a DeepSpeed ZeRO 1, 2 or 3 optimizer, in group order."""
    if all(weight == 1 for weight in weights):
        return
    if zero_stage == 3:
        optimizer._get_norm_groups = _zero3(optimizer, optimizer._get_norm_groups, weights)
    elif isinstance(optimizer, BF16_Optimizer):  # DeepSpeed's choice for ZeRO 1 in bf16
        optimizer.get_grads_for_norm = _bf16(optimizer, optimizer.get_grads_for_norm, weights)
    else:
        optimizer.scaled_global_norm = _flat(optimizer, weights)


def _zero3(optimizer: Any, norms: Callable[[], list[Any]], weights: Sequence[float]) -> Any:
    """Weight the norms of ZeRO 3 sub-groups, the parts of a group that are updated in turn."""

    def weighted() -> list[Any]:
        group_of = optimizer.sub_group_to_group_id
        return [norm * weights[group_of[index]] ** 0.5 for index, norm in enumerate(norms())]

    return weighted


def _bf16(optimizer: Any, gradients: Callable[..., Any], weights: Sequence[float]) -> Any:
    """Replace each gradient by its weighted norm; the norm of a scalar is the scalar itself."""
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
    """Weight DeepSpeed's sum over groups, which encodes a non-finite norm as a negative value."""

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


def clip_replicated_gradients(
    groups: Sequence[tuple[Sequence[Any], float]], limit: float, topology: Topology
) -> Tensor:
    """Clip the gradients of (parameters, weight) groups in place and return their norm; ZeRO 0.

    All data-parallel ranks hold the same full gradients. A `limit` of 0 disables clipping.
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


def reuse_flat_gradients(optimizer: Any) -> None:
    """Accumulate gradients in flat tensors; for a new, not offloaded ZeRO 1 or 2 optimizer.

    On a CPU the flat tensors are reused in every step, because new memory costs more than a sum.
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
