"""Bias-free linear layers that read the same input, as one autograd function.

The gradient of the input, dx = sum_i dy_i W_i, is accumulated by the matrix products in one buffer:
autograd would allocate one per layer and add them, in the precision of the input. The forward pass
is that of separate layers, bit for bit: the weights remain separate parameters, each with its own
sharding and growth, and are not concatenated. The gradients of all weights exist at the same time,
which the planned memory includes (`planning/memory.py`).

Shapes: ... leading dimensions, N their product, D input and F output features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def apply_linears(x: Tensor, *modules: nn.Linear) -> tuple[Tensor, ...]:
    """Return the outputs of modules without bias on x (..., D).

    Under autocast x and the weights are cast as by separate layers.

    The modules are not called, so their hooks do not run: under ZeRO 3 the hooks of the block
    gather the weights (`parallel/partitions.py`). A module must belong to the block that is
    running.
    """
    weights = [module.weight for module in modules]
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # One copy of x, where autocast makes one per layer.
        x, *weights = (each.to(torch.get_autocast_dtype(device)) for each in (x, *weights))
    if torch._C._are_functorch_transforms_active():  # needs differentiation rules of its own
        return tuple(F.linear(x, weight) for weight in weights)
    return _Linears.apply(x, *weights)


class _Linears(torch.autograd.Function):
    """Matrix products with one input. Gradients of the weights are returned together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x_ND, dx_ND = x.reshape(-1, x.shape[-1]), None
        needs_dx, *needed = ctx.needs_input_grad
        found: list[Tensor | None] = []
        for weight, dy, needs_dw in zip(weights, gradients, needed, strict=True):
            if dy is None:
                found.append(None)
                continue
            dy_NF = dy.reshape(-1, dy.shape[-1])
            found.append(dy_NF.t() @ x_ND if needs_dw else None)
            if needs_dx:
                dx_ND = dy_NF @ weight if dx_ND is None else dx_ND.addmm_(dy_NF, weight)
        return None if dx_ND is None else dx_ND.view(x.shape), *found
