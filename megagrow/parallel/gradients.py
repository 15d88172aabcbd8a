"""Global gradient norm with a weight per optimizer group.

norm^2 = sum over groups of weight * |g|^2, reported and used for clipping. With the weights
k_out / k_in a grown model's norm equals that of its source (docs/reference/operators.md). A
parameter replicated on all tensor-parallel ranks is counted once.

DeepSpeed's optimizers have no such weights. Under ZeRO 3 `set_norm_weights` adds them per instance,
by replacing the one method that turns gradients into norms.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.parallel.process_groups import Topology


def set_norm_weights(optimizer: Any, zero_stage: int, weights: Sequence[float]) -> None:
    """Set the group weights of a DeepSpeed ZeRO 1, 2 or 3 optimizer, in group order."""
    if all(weight == 1 for weight in weights):
        return
    if zero_stage == 3:
        optimizer._get_norm_groups = _zero3(optimizer, optimizer._get_norm_groups, weights)
    else:
        optimizer.norm_weights = weights


def _zero3(optimizer: Any, norms: Callable[[], list[Any]], weights: Sequence[float]) -> Any:
    """Weight the norms of ZeRO 3 sub-groups, the parts of a group that are updated in turn."""

    def weighted() -> list[Any]:
        group_of = optimizer.sub_group_to_group_id
        return [norm * weights[group_of[index]] ** 0.5 for index, norm in enumerate(norms())]

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
