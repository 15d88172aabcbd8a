"""Declaration of Mamba-1 (Gu and Dao 2023, arXiv 2312.00752, figure 3): a gated selective scan.

The projection of the input is two parameters, `in_proj` of the scanned branch and `gate_proj` of
its gate, so that tensor parallelism and growth treat their rows as the same channels. Every
parameter of a channel belongs to it alone, except `x_proj`, which mixes all channels to the step
size and to B and C of a token. Under tensor parallelism it returns partial sums.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.base import (
    READS_RESIDUAL,
    WRITES_RESIDUAL,
    ActivationAxis,
    InitialValues,
    LayerType,
    ParameterDeclaration,
    ones,
    scaled_normal,
)
from megagrow.model.layers.costs import (
    ContextElements,
    KernelArguments,
    KernelInputs,
    MicroBatch,
    RowElements,
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


TRITON_CHUNK, MAMBA_SSM_CHUNK = 64, 2048
"""Tokens between the states that these backends keep; mamba-ssm keeps two numbers per state."""


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
    ParameterDeclaration("conv1d.weight", INNER.produced, TAPS.consumed, _taps, is_depthwise=True),
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
    """Return the bytes of the convolution, the scan, the gate and the gated product.

    `selective` does not keep the product. All ranks keep the inputs of dt, B and C. With context
    parallelism the scan reads a copy of the output of the convolution, in another order.
    """
    gated = 1 if batch.pointwise == "triton" else 2
    kept = (1 if batch.checkpointing == "selective" else 1 + gated) + (batch.cp > 1)
    channels = INNER.size(config) * batch.tokens
    dynamics = DYNAMICS.size(config) * batch.tokens * batch.tp
    return (kept * channels + dynamics) * batch.width + _scan_bytes(config, batch)


def _scan_bytes(config: ModelConfig, batch: MicroBatch) -> int:
    """Return the bytes of the convolution's input and output, dt, the output of the scan, and the
    states that the scan keeps.

    mamba-ssm also keeps copies of x, B and C. torch computes in fp32: it keeps the input and the
    output of the convolution before SiLU, dt before and after softplus, its product with x, and
    copies of x, B and C in lower precision.
    """
    channels = INNER.size(config) * batch.tokens
    of_tokens = 2 * STATE.size(config) * batch.tokens * batch.cp * batch.tp
    state = 4 * INNER.size(config) * STATE.size(config) // batch.cp
    if batch.scan == "triton":
        chunks = -(-batch.sequence_length // TRITON_CHUNK)
        return 4 * channels * batch.width + batch.sequences * chunks * state
    if batch.scan == "mamba_ssm":
        chunks = -(-batch.sequence_length // MAMBA_SSM_CHUNK)
        kept = (5 * channels + of_tokens) * batch.width
        return kept + 2 * batch.sequences * chunks * state
    copies = 4 * (channels + of_tokens) if batch.width < 4 else 0
    return (5 * 4 + 2 * batch.width) * channels + copies + _torch_states(config, batch) * state


def _torch_states(config: ModelConfig, batch: MicroBatch) -> int:
    """Return the number of states of all channels that the scan of torch keeps."""
    from megagrow.model.selective_scan import block_size

    state = INNER.size(config) // (batch.tp * batch.cp) * STATE.size(config)
    _, tokens = block_size(batch.sequences, batch.sequence_length, state, batch.on_cpu)
    return batch.sequences * (1 - -batch.sequence_length // tokens)


def _context_elements(config: ModelConfig, tp: int, cp_comm_type: str) -> ContextElements:
    """Return the elements of B and C, and of the channels before and after the convolution, and
    before (x and dt) and after the scan."""
    channels = INNER.size(config) // tp
    return ContextElements(gathered=2 * STATE.size(config), exchanged=5 * channels)


def _partial_sums(config: ModelConfig, width: int) -> int:
    """Return the bytes of the outputs of x_proj."""
    return DYNAMICS.size(config) * width


def _row_elements(config: ModelConfig) -> RowElements:
    """Return the traffic of the convolution, the scan and the gated product with Triton.

    The convolution takes 2 elements of a channel forward and 3 backward, the product 3 and 5. The
    scan reads x and dt for the states of chunks, then both again for its output; backward dy and dt
    for the gradients of states, then dy, x and dt for those of x and dt. The fp32 states of a chunk
    pass through memory 6 and 7 times. The time of the exponentials is not included.
    """
    channels = INNER.size(config)
    states = 2 * channels * STATE.size(config) // TRITON_CHUNK
    forward, backward = 2 + 5 + 3, 3 + 7 + 5
    return RowElements(
        forward * channels + 6 * states, backward * channels + 7 * states, 3 * channels
    )


def _kernel_calls(config: ModelConfig, inputs: KernelInputs) -> Iterator[KernelArguments]:
    channels = INNER.size(config) // inputs.tp
    scanned = channels // inputs.cp
    shape = {"batch": inputs.batch, "sequence": inputs.sequence, "channels": scanned}
    dtypes = {"dtype": inputs.dtype, "parameter_dtype": inputs.parameter_dtype}
    yield "causal_conv", {**shape, "taps": TAPS.size(config), **dtypes}
    yield "selective_scan", {**shape, "states": STATE.size(config), **dtypes}
    yield "swiglu", {"rows": inputs.rows, "width": channels, "dtype": inputs.dtype}


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
    row_elements=_row_elements,
    kernel_calls=_kernel_calls,
    score_label="selective scan",
    score_flops=_scan_flops,
    partial_sums=_partial_sums,
    context_elements=_context_elements,
    decoding_state=_decoding_state,
)
