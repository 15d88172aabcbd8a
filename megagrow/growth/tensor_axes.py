"""Which wires each tensor of the model stands between: the one table of the algebra.

A tensor produces the wire of its rows and consumes the wire of its columns; the embedding produces
both, and a norm's gain scales the residual stream (docs/reference/operators.md).
"""

from typing import Literal, NamedTuple

import numpy as np

from megagrow.growth.lifts import Lift
from megagrow.growth.map import SAME, Axis
from megagrow.growth.width import Width, Wire
from megagrow.parallel.sharding import ParamSpec

AxisSide = Literal["produces", "consumes", "gain", "tied gain"]


class AxisRole(NamedTuple):
    """One axis of a tensor: the wire that it belongs to, and what it does to it."""

    wire: Wire
    side: AxisSide


_TENSORS: dict[str, tuple[AxisRole, AxisRole | None]] = {
    "embed_tokens": (AxisRole("vocab", "produces"), AxisRole("residual", "produces")),
    "lm_head": (AxisRole("vocab", "produces"), AxisRole("residual", "consumes")),
    "q_proj": (AxisRole("query", "produces"), AxisRole("residual", "consumes")),
    "k_proj": (AxisRole("key", "produces"), AxisRole("residual", "consumes")),
    "v_proj": (AxisRole("value", "produces"), AxisRole("residual", "consumes")),
    "o_proj": (AxisRole("residual", "produces"), AxisRole("mixed", "consumes")),
    "gate_proj": (AxisRole("ffn", "produces"), AxisRole("residual", "consumes")),
    "up_proj": (AxisRole("ffn", "produces"), AxisRole("residual", "consumes")),
    "down_proj": (AxisRole("residual", "produces"), AxisRole("ffn", "consumes")),
    "input_layernorm": (AxisRole("residual", "gain"), None),
    "post_attention_layernorm": (AxisRole("residual", "gain"), None),
    "norm": (AxisRole("residual", "gain"), None),
}

LAST_PROJECTIONS = ("o_proj", "down_proj")
"""What a block adds to the residual stream comes out of these."""


def leaf(spec: ParamSpec) -> str:
    """`q_proj` of `model.layers.3.self_attn.q_proj.weight`."""
    return spec.name.split(".")[-2]


def strands(spec: ParamSpec, tied: bool) -> tuple[AxisRole, AxisRole | None]:
    """What the rows and the columns of a parameter are; columns of a vector are nothing.

    With a tied head the embedding's columns are consumed as well, as they are: then the gain of
    the final norm has to share out what they repeat (docs/reference/operators.md, fix A).
    """
    rows, cols = _TENSORS[leaf(spec)]
    if tied and spec.name == "model.norm.weight":
        rows = AxisRole("residual", "tied gain")
    return rows, cols


def axis(strand: AxisRole | None, width: Width, moments: bool) -> Axis:
    """How one axis of the weights, or of Adam's first moment, is made of the source's."""
    if strand is None:
        return SAME
    lift = width.wires[strand.wire]
    scale = _scale(strand.side, lift, width.gain, moments)
    if lift.unchanged and (scale == 1).all():
        return SAME
    return Axis(lift.index, None if (scale[~lift.new] == 1).all() else scale)


def _scale(side: AxisSide, lift: Lift, gain: float, moments: bool) -> np.ndarray:
    share = lift.share / lift.produce
    if moments and not lift.lawful:
        return np.ones(lift.grown_size)
    match side:
        case "produces":
            return share if moments else lift.produce
        case "consumes":
            return lift.produce if moments else share
        case "gain":
            return share / gain if moments else np.full(lift.grown_size, gain)
        case "tied gain":
            return np.full(lift.grown_size, 1 / gain) if moments else gain * share
