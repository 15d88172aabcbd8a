"""Declaration of Mamba-1 (Gu and Dao 2023, arXiv 2312.00752, figure 3): a gated selective scan.

The projection of the input is two parameters, `in_proj` of the scanned branch and `gate_proj` of
its gate, so that tensor parallelism and growth treat their rows as the same channels. Every
parameter of a channel belongs to it alone, except `x_proj`, which mixes all channels to the step
size and to B and C of a token. Under tensor parallelism it returns partial sums.
"""

from typing import TYPE_CHECKING

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.base import (
    READS_RESIDUAL,
    WRITES_RESIDUAL,
    ActivationAxis,
    InitialValues,
    LayerType,
    MicroBatch,
    ParameterDeclaration,
    ones,
    scaled_normal,
)

if TYPE_CHECKING:
    from megagrow.model.layers.decoding import DecodedSequences, DecodingState
    from megagrow.model.layers.modules import LayerModule

INNER = ActivationAxis("inner", ("mamba_d_inner",), "mamba_d_inner")
"""Channels. All per-channel values are copied with their channel: the convolution, dt, A and D."""

TAPS = ActivationAxis("taps", ("mamba_d_conv",), None, sliced=False)
STATE = ActivationAxis("state", ("mamba_d_state",), None, sliced=False)
RANK = ActivationAxis("dt_rank", ("mamba_dt_rank",), None, sliced=False)

DYNAMICS = ActivationAxis("dynamics", ("mamba_dynamics",), None, sliced=False)
"""Step size, B and C of a token, before dt_proj: dt_rank + 2 d_state entries."""


def _dt_weight(config: ModelConfig) -> InitialValues:
    return InitialValues("uniform", RANK.size(config) ** -0.5)


def _dt_bias(config: ModelConfig) -> InitialValues:
    return InitialValues("inverse softplus")


def _taps(config: ModelConfig) -> InitialValues:
    """Return torch's default for a depthwise convolution."""
    return InitialValues("uniform", TAPS.size(config) ** -0.5)


def _log_of_state(config: ModelConfig) -> InitialValues:
    """Return A = -(1, 2, ..., d_state) in each channel (S4D-real)."""
    return InitialValues("log of column")


_PARAMETERS = (
    ParameterDeclaration("A_log", INNER.produced, STATE.consumed, _log_of_state, is_product=False),
    ParameterDeclaration("D", INNER.produced, None, ones),
    ParameterDeclaration("in_proj.weight", INNER.produced, READS_RESIDUAL),
    ParameterDeclaration("gate_proj.weight", INNER.produced, READS_RESIDUAL),
    ParameterDeclaration("conv1d.weight", INNER.produced, TAPS.consumed, _taps),
    ParameterDeclaration("conv1d.bias", INNER.produced, None, _taps),
    ParameterDeclaration("x_proj.weight", DYNAMICS.produced, INNER.consumed),
    ParameterDeclaration("dt_proj.weight", INNER.produced, RANK.consumed, _dt_weight),
    ParameterDeclaration("dt_proj.bias", INNER.produced, None, _dt_bias),
    ParameterDeclaration("out_proj.weight", WRITES_RESIDUAL, INNER.consumed, scaled_normal),
)


def _parameters(config: ModelConfig) -> tuple[ParameterDeclaration, ...]:
    return _PARAMETERS


def _scan_flops(config: ModelConfig, sequence_length: int) -> int:
    """Return the training FLOPs per token of the recurrence.

    Per channel and state entry, the forward pass multiplies and adds for the decayed state, the
    input and the output: 6 FLOPs, and twice that in the backward pass.
    """
    return 18 * INNER.size(config) * STATE.size(config)


def _activation_bytes(config: ModelConfig, batch: MicroBatch) -> int:
    """Return the bytes of the input of the convolution, its output, the gate, dt, the output of the
    scan and the gated product, and the states that the scan keeps.

    `selective` does not keep the gated product. All ranks keep the inputs of dt, B and C.
    """
    gated = {"triton": 1, "torch": 2}.get(batch.pointwise, 2)
    kept = 5 if batch.checkpointing == "selective" else 5 + gated
    channels = INNER.size(config) * batch.tokens
    dynamics = 2 * DYNAMICS.size(config) * batch.tokens * batch.tp
    states = 4 * channels * STATE.size(config) // SCAN_CHUNK
    return (kept * channels + dynamics) * batch.width + states


SCAN_CHUNK = 64
"""Tokens between the states that the scan keeps for the backward pass."""


def _build(config: ModelConfig) -> "LayerModule":
    from megagrow.model.layers.mamba_module import Mamba

    return Mamba(config)


def _decoding_state(sequences: "DecodedSequences") -> "DecodingState":
    from megagrow.model.layers.decoding import ScanState

    return ScanState(sequences)


MAMBA = LayerType(
    "mamba",
    label="Mamba's projections",
    parameters=_parameters,
    activation_bytes=_activation_bytes,
    build=_build,
    score_label="selective scan",
    score_flops=_scan_flops,
    decoding_state=_decoding_state,
)
