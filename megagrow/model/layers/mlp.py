"""Declaration of the SwiGLU feed-forward block."""

from typing import TYPE_CHECKING

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.base import (
    READS_RESIDUAL,
    WRITES_RESIDUAL,
    ActivationAxis,
    AxisRole,
    LayerType,
    MicroBatch,
    ParameterDeclaration,
)

if TYPE_CHECKING:
    from megagrow.model.layers.modules import Block

FFN = ActivationAxis("ffn", ("intermediate_size",), "intermediate_size")

_PARAMETERS = (
    ParameterDeclaration("gate_proj", AxisRole(FFN, "produces"), READS_RESIDUAL, "normal"),
    ParameterDeclaration("up_proj", AxisRole(FFN, "produces"), READS_RESIDUAL, "normal"),
    ParameterDeclaration("down_proj", WRITES_RESIDUAL, AxisRole(FFN, "consumes"), "scaled normal"),
)


def _parameters(config: ModelConfig) -> tuple[ParameterDeclaration, ...]:
    return _PARAMETERS


def _activation_bytes(config: ModelConfig, batch: MicroBatch) -> int:
    """Return the bytes of gate, silu(gate), up and their product."""
    return 4 * FFN.size(config) * batch.tokens * batch.width


def _build(config: ModelConfig) -> "Block":
    from megagrow.model.layers.modules import MLP

    return MLP(config)


MLP = LayerType(
    "mlp",
    label="feed-forward",
    parameters=_parameters,
    activation_bytes=_activation_bytes,
    build=_build,
)
