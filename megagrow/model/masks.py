"""Masks that let the new parts of a grown model in, little by little.

MSG (Yao et al. 2024, "Masked Structural Growth"), and G_random of Du et al. 2024 (appendix A.5).
New parts are multiplied by factors c that rise from 0 to 1. At 0 the model computes what the
smaller
one computed, whatever the new numbers are; where all are 1 there are no masks any more. Old entries
of an axis come first and new ones behind them, new layers stand on top of the old ones.

Shapes: B batch, S sequence, D hidden size, F feed-forward width, G key/value heads.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.model.ops import Ops

_AXES = {
    "ffn": "intermediate_size",
    "residual": "hidden_size",
    "groups": "num_key_value_heads",
}
"""Width masks, in the order in which MSG grows the axes, and the config fields of their sizes."""


@dataclass(frozen=True, eq=False)
class Masks:
    """Growth masks: factors from 0 to 1 in the model; None where all are 1.

    Tensors are fp32; the model uses copies in the dtype of its hidden states.
    """

    layers: tuple[float, ...] = ()
    """Per layer: factor on both outputs added to the residual stream."""
    residual: Tensor | None = None
    """(D,): factor on the embedding and layer outputs; weights the mean square of the norms."""
    groups: Tensor | None = None
    """(G,): factor on keys, values and their queries, and thus on the attention output."""
    ffn: Tensor | None = None
    """(F,): on the activations of the feed-forward."""

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
    source: ModelConfig, target: ModelConfig, tokens: int, ramp_tokens: int
) -> Masks | None:
    """The masks of a model that grew from a smaller one `tokens` ago; None once all are 1.

    All rise linearly, new layers over the full `ramp_tokens`. The axes of the width share
    it evenly, one after the other: the feed-forward, the residual stream, the heads.
    """
    new_layers = target.num_hidden_layers - source.num_hidden_layers
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
    layers = (1.0,) * source.num_hidden_layers + (tokens / ramp_tokens,) * new_layers
    return Masks(layers if new_layers else (), **tensors)


def wider_axes(source: ModelConfig, target: ModelConfig) -> list[str]:
    """Return the axes that grow in width, by mask name, in ramp order."""
    return [name for name, size in _AXES.items() if getattr(source, size) < getattr(target, size)]


def masked(x: Tensor, mask: Tensor | float | None) -> Tensor:
    """x times a factor, or times one for each entry of its last dimension; None changes nothing."""
    return x if mask is None else x * mask


def masked_groups(x_BSHK: Tensor, mask_G: Tensor | None) -> Tensor:
    """Return heads (B, S, H, K) times the factor of their group; H is a multiple of G."""
    if mask_G is None:
        return x_BSHK
    mask_H = mask_G.repeat_interleave(x_BSHK.shape[2] // len(mask_G))
    return x_BSHK * mask_H[:, None]


def masked_rms_norm(ops: Ops, x: Tensor, weight: Tensor, eps: float, mask: Tensor | None) -> Tensor:
    """RMSNorm whose mean square is weighted by the mask, times the mask; x (..., D), mask (D,).

    With c the mask: c x / sqrt(sum(c x^2) / sum(c) + eps) * weight (MSG's norm, without a mean).
    It is the plain norm of x sqrt(c D / sum(c)) with the gain that undoes what is not c. At c = 0
    it is the norm of the smaller model, with its gain and its eps; at c = 1 the plain one.
    """
    if mask is None:
        return ops.rms_norm(x, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    mask = mask.to(wide)
    share = mask.mean()
    spread, gain = (mask / share).sqrt(), (mask * share).sqrt()
    return ops.rms_norm(x * spread, weight * gain, eps).to(x.dtype)
