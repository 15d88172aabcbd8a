"""Linear layers that read the same input, as one autograd function.

The gradient of the input, dx = sum_i dy_i W_i, is accumulated by the matrix products in one buffer:
autograd would allocate one per layer and add them, in the precision of the input. The forward pass
is that of separate layers, bit for bit: the weights remain separate parameters, each with its own
sharding and growth, and are not concatenated. The gradients of all weights exist at the same time,
which the planned memory includes (`planning/memory.py`).

Shapes: ... leading dimensions, N their product, D input and F output features.
"""

from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def apply_linears(x: Tensor, *modules: nn.Linear) -> tuple[Tensor, ...]:
    """Return the outputs of modules on x (..., D). All modules have a bias, or none has.

    Under autocast x and the weights are cast as by separate layers.

    The modules are not called, so their hooks do not run: under ZeRO 3 the hooks of the block
    gather the weights (`parallel/partitions.py`). A module must belong to the block that is
    running.
    """
    weights: list[Tensor] = [module.weight for module in modules]
    biases: list[Tensor] = [module.bias for module in modules if module.bias is not None]
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # One copy of x, where autocast makes one per layer.
        dtype = torch.get_autocast_dtype(device)
        x, weights, biases = x.to(dtype), _cast(weights, dtype), _cast(biases, dtype)
    if torch._C._are_functorch_transforms_active():  # needs differentiation rules of its own
        return _outputs(x, weights, biases)
    return _Linears.apply(x, len(weights), *weights, *biases)


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]


def _outputs(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, ...]:
    pairs = zip_longest(weights, biases)
    return tuple(F.linear(x, weight, bias) for weight, bias in pairs)


class _Linears(torch.autograd.Function):
    """Matrix products with one input. Gradients of the weights are returned together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, biases = list(parameters[:count]), list(parameters[count:])
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        return _outputs(x, weights, biases)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x_ND, dx_ND = x.reshape(-1, x.shape[-1]), None
        needs_dx, _, *needed = ctx.needs_input_grad
        has_biases = len(needed) > len(weights)
        of_weights: list[Tensor | None] = [None] * len(weights)
        of_biases: list[Tensor | None] = [None] * len(weights) if has_biases else []
        for index, (weight, dy) in enumerate(zip(weights, gradients, strict=True)):
            if dy is None:
                continue
            dy_NF = dy.reshape(-1, dy.shape[-1])
            if needed[index]:
                of_weights[index] = dy_NF.t() @ x_ND
            if has_biases:
                of_biases[index] = dy_NF.sum(0)
            if needs_dx:
                dx_ND = dy_NF @ weight if dx_ND is None else dx_ND.addmm_(dy_NF, weight)
        return None if dx_ND is None else dx_ND.view(x.shape), None, *of_weights, *of_biases
