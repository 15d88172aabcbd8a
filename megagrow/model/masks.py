"""Growth masks: factors that ramp in the new parts of a grown model.

MSG (Yao et al. 2024, "Masked Structural Growth") and G_random of Du et al. 2024 (appendix A.5)
multiply new parts by factors c that rise from 0 to 1. At c = 0 the model computes the same function
as the smaller model, for any values of the new parameters. Once all factors are 1, the masks are
removed. New entries of an axis follow the old ones.

Shapes: B batch, S sequence, D hidden size, F feed-forward width, G key/value heads,
C channels of Mamba layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.model.ops import Ops

_AXES = {
    "ffn": "intermediate_size",
    "residual": "hidden_size",
    "groups": "num_key_value_heads",
    "inner": "mamba_d_inner",
}
"""Width masks in MSG's growth order, and the config fields of their sizes."""


@dataclass(frozen=True, eq=False)
class Masks:
    """Factors from 0 to 1 of each masked axis; None if all are 1.

    Tensors are fp32; the model uses copies in the dtype of its hidden states.
    """

    layers: tuple[float, ...] = ()
    """Per layer: factor on both outputs added to the residual stream."""
    residual: Tensor | None = None
    """(D,): factor on the embedding and layer outputs; weights the mean square of the norms."""
    groups: Tensor | None = None
    """(G,): factor on keys, values and their queries, and thus on the attention output."""
    ffn: Tensor | None = None
    """(F,): factor on the feed-forward activations."""
    inner: Tensor | None = None
    """(C,): factor on the channels of Mamba layers after their convolution."""

    def gate(self, layer: int) -> Tensor | float | None:
        """Return the factor on the two outputs that a layer adds to the residual stream."""
        coefficient = self.layers[layer] if self.layers else 1.0
        if coefficient == 1.0:
            return self.residual
        return coefficient if self.residual is None else coefficient * self.residual

    def to(self, place: torch.device | torch.dtype) -> "Masks":
        """Return the masks on another device or in another dtype."""
        tensors = {name: getattr(self, name) for name in _AXES}
        return replace(self, **{name: t.to(place) for name, t in tensors.items() if t is not None})


def masks_at(
    source: ModelConfig,
    target: ModelConfig,
    tokens: int,
    ramp_tokens: int,
    new_layers: Sequence[int] | None = None,
) -> Masks | None:
    """Return the masks of a model that grew `tokens` tokens ago; None once all factors are 1.

    All factors rise linearly. The factors of new layers rise over `ramp_tokens`. The grown width
    axes rise one after the other, each over an equal part of it: feed-forward, residual stream,
    heads, Mamba channels. `new_layers` are indices of the target's layers; default: those on top.
    """
    if new_layers is None:
        new_layers = range(source.num_hidden_layers, target.num_hidden_layers)
    axes = wider_axes(source, target)
    if tokens >= ramp_tokens or not (new_layers or axes):
        return None
    tensors = {}
    for index, name in enumerate(axes):
        risen = tokens * len(axes) - index * ramp_tokens
        if risen < ramp_tokens:
            old, size = (getattr(model, _AXES[name]) for model in (source, target))
            tensors[name] = torch.ones(size)
            tensors[name][old:] = max(0, risen) / ramp_tokens
    factors = [1.0] * target.num_hidden_layers
    for layer in new_layers:
        factors[layer] = tokens / ramp_tokens
    return Masks(tuple(factors) if new_layers else (), **tensors)


def wider_axes(source: ModelConfig, target: ModelConfig) -> list[str]:
    """Return the axes that grow in width, by mask name, in ramp order."""
    sizes = ((name, getattr(source, size), getattr(target, size)) for name, size in _AXES.items())
    return [name for name, old, new in sizes if old is not None and old < new]


def masked(x: Tensor, mask: Tensor | float | None) -> Tensor:
    """Return x times a factor or a vector of factors of its last dimension; x if mask is None."""
    return x if mask is None else x * mask


def masked_groups(x_BSHK: Tensor, mask_G: Tensor | None) -> Tensor:
    """Return heads (B, S, H, K) times the factors (G,) of their groups; H is a multiple of G."""
    if mask_G is None:
        return x_BSHK
    mask_H = mask_G.repeat_interleave(x_BSHK.shape[2] // len(mask_G))
    return x_BSHK * mask_H[:, None]


def masked_rms_norm(ops: Ops, x: Tensor, weight: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    """Return the masked RMSNorm of x: the mask weights the mean square and scales the output.

    x is (..., D), weight and mask are (D,). With c the mask, the result is
    c x / sqrt(sum(c x^2) / sum(c) + eps) * weight, MSG's norm without mean subtraction. It is
    computed as the plain norm of x sqrt(c D / sum(c)) with the gain weight sqrt(c sum(c) / D). If c
    is 0 for all new entries, it equals the smaller model's norm, including its gain and eps; if c
    is 1, the plain norm.
    """
    if mask is None:
        return ops.rms_norm(x, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    mask = mask.to(wide)
    share = mask.mean()
    spread, gain = (mask / share).sqrt(), (mask * share).sqrt()
    return ops.rms_norm(x * spread, weight * gain, eps).to(x.dtype)
