"""Declaration of the SwiGLU feed-forward block."""

from typing import TYPE_CHECKING

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.base import (
    READS_RESIDUAL,
    WRITES_RESIDUAL,
    ActivationAxis,
    LayerType,
    MicroBatch,
    ParameterDeclaration,
    scaled_normal,
)

if TYPE_CHECKING:
    from megagrow.model.layers.modules import LayerModule

FFN = ActivationAxis("ffn", ("intermediate_size",), "intermediate_size")

_PARAMETERS = (
    ParameterDeclaration("gate_proj.weight", FFN.produced, READS_RESIDUAL),
    ParameterDeclaration("up_proj.weight", FFN.produced, READS_RESIDUAL),
    ParameterDeclaration("down_proj.weight", WRITES_RESIDUAL, FFN.consumed, scaled_normal),
)


def _parameters(config: ModelConfig) -> tuple[ParameterDeclaration, ...]:
    return _PARAMETERS


def _activation_bytes(config: ModelConfig, batch: MicroBatch) -> int:
    """Return the bytes of gate, up, silu(gate) and the product.

    Triton's SwiGLU does not keep silu(gate); `selective` keeps gate and up only.
    """
    kept = 3 if batch.pointwise == "triton" else 4
    if batch.checkpointing == "selective":
        kept = 2
    return kept * FFN.size(config) * batch.tokens * batch.width


def _build(config: ModelConfig) -> "LayerModule":
    from megagrow.model.layers.modules import MLP

    return MLP(config)


MLP = LayerType(
    "mlp",
    label="feed-forward",
    parameters=_parameters,
    activation_bytes=_activation_bytes,
    build=_build,
)
