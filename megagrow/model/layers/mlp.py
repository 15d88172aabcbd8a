"""Declaration of the SwiGLU feed-forward block."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.base import (
    READS_RESIDUAL,
    WRITES_RESIDUAL,
    ActivationAxis,
    LayerType,
    ParameterDeclaration,
    scaled_normal,
)
from megagrow.model.layers.costs import (
    KernelArguments,
    KernelInputs,
    MicroBatch,
    RowElements,
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


def _row_elements(config: ModelConfig) -> RowElements:
    """Return the traffic of SwiGLU: two inputs and the product, and their gradients."""
    width = FFN.size(config)
    return RowElements(3 * width, 5 * width, 3 * width)


def _kernel_calls(config: ModelConfig, inputs: KernelInputs) -> Iterator[KernelArguments]:
    width = FFN.size(config) // inputs.tp
    yield "swiglu", {"rows": inputs.rows, "width": width, "dtype": inputs.dtype}


def _build(config: ModelConfig) -> "LayerModule":
    from megagrow.model.layers.modules import MLP

    return MLP(config)


MLP = LayerType(
    "mlp",
    label="feed-forward",
    parameters=_parameters,
    activation_bytes=_activation_bytes,
    build=_build,
    row_elements=_row_elements,
    kernel_calls=_kernel_calls,
)
