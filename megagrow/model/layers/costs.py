"""Inputs and results of the costs that a layer type declares: memory, exchanges and kernels."""

from dataclasses import dataclass
from typing import NamedTuple

from megagrow.config.schema import ModelConfig


@dataclass(frozen=True)
class MicroBatch:
    """Settings of a stage that determine the activation bytes of a layer."""

    tokens: int
    """Tokens of the micro-batch on one context-parallel rank."""
    sequence_length: int
    width: int
    """Bytes per element of the forward pass."""
    tp: int
    attention: str
    """Attention backend; see `kernels.attention`."""
    pointwise: str
    """Backend of SwiGLU; see `kernels.pointwise`."""
    scan: str
    """Backend of the selective scan; see `kernels.scan`."""
    checkpointing: str
    """Value of `activation_checkpointing`."""
    on_cpu: bool = False
    cp: int = 1
    """Context-parallel size."""
    cp_comm_type: str = "all_gather"
    """See `parallel.cp_comm_type`."""

    @property
    def sequences(self) -> int:
        """Return the sequences of the micro-batch."""
        return self.tokens * self.cp // self.sequence_length


class ContextElements(NamedTuple):
    """Elements per token that a block exchanges between context-parallel ranks in a forward pass,
    on one tensor-parallel rank; the backward pass exchanges as many."""

    gathered: int = 0
    """Elements that each rank gathers of all tokens; their gradients are reduce-scattered."""
    exchanged: int = 0
    """Elements of a rank's own tokens in all-to-alls."""


@dataclass(frozen=True)
class KernelInputs:
    """Settings of a stage that determine the Triton kernels of a layer."""

    batch: int
    """Sequences of a micro-batch."""
    sequence: int
    tp: int
    dtype: str
    """Dtype of the forward pass, such as `bfloat16`."""
    parameter_dtype: str
    """Dtype of parameters outside matrix products, and of rotary tables: fp32 under autocast."""
    cp: int = 1
    """Context-parallel size."""
    cp_comm_type: str = "all_gather"

    @property
    def local_sequence(self) -> int:
        """Return the tokens of a sequence on one context-parallel rank."""
        return self.sequence // self.cp

    @property
    def rows(self) -> int:
        """Return the tokens of a micro-batch on one context-parallel rank."""
        return self.batch * self.local_sequence


KernelArguments = tuple[str, dict[str, int | str]]
"""Op, and its arguments as a function of `megagrow_kernels.calls` takes them."""


class RowElements(NamedTuple):
    """Elements per token that memory-bound operations of a block read and write."""

    forward: int
    backward: int
    recomputed: int = 0
    """Additional elements of the backward pass with selective activation checkpointing."""


def none(config: ModelConfig, *_: int) -> int:
    """Return 0, for a layer type without the counted operations."""
    return 0


def of_single_tokens(config: ModelConfig, tp: int, cp_comm_type: str) -> ContextElements:
    """Return no elements, for a layer type whose outputs depend on one token each."""
    return ContextElements()
