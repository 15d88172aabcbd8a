"""Kernel calls of a stage: the Triton kernels that it launches and their tensor shapes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from megagrow.config.schema import StageConfig
from megagrow.model.backends import Backends
from megagrow.model.layers.costs import KernelArguments, KernelInputs
from megagrow.model.layers.table import block_counts
from megagrow.parallel.sharding import pad, real_rows

OPERATION_OF = {
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "rope": "pointwise",
    "swiglu": "pointwise",
    "attention": "attention",
    "cross_entropy": "loss",
    "causal_conv": "scan",
    "selective_scan": "scan",
}
"""Operation of the `kernels` section that launches each op."""


@dataclass(frozen=True)
class KernelCall:
    """One op, forward and backward, with the arguments of `megagrow_kernels.calls`."""

    op: str
    arguments: tuple[tuple[str, int | str], ...]

    def as_json(self) -> list[Any]:
        """Return the input format of `megagrow_kernels.warm_up` and `.self_check`."""
        return [self.op, dict(self.arguments)]

    def __str__(self) -> str:
        listing = ", ".join(f"{name}={value}" for name, value in self.arguments)
        return f"{self.op}({listing})"


Checks = Mapping[KernelCall, str | None]
"""Result of the self-check of each call: None if its kernels are correct, else the reason why not.
A call that was not checked is missing."""

NO_CHECKS: Checks = MappingProxyType({})


def stage_kernels(
    stage: StageConfig, dtype: torch.dtype, backends: Backends
) -> tuple[KernelCall, ...]:
    """Return the distinct Triton kernel calls of a stage; empty if no backend is Triton.

    The calls cover all tensor-parallel ranks. The global batch and the data-parallel size do not
    affect any kernel.

    Args:
        stage: the stage.
        dtype: dtype of the forward and backward pass.
        backends: backend of each operation.
    """
    return tuple(dict.fromkeys(_calls(stage, dtype, backends)))


def _calls(stage: StageConfig, dtype: torch.dtype, backends: Backends) -> Iterator[KernelCall]:
    parallel, batch = stage.parallel, stage.batch.micro_batch_size
    low = str(dtype).removeprefix("torch.")
    # Without ZeRO, bf16 is torch's autocast: only matrix products are in bf16.
    wide = low if parallel.zero_stage > 0 else "float32"
    tp = parallel.tensor_model_parallel_size
    context = parallel.context_parallel_size, parallel.cp_comm_type
    inputs = KernelInputs(batch, stage.data.sequence_length, tp, low, wide, *context)
    calls = [*_residual_norms(stage, inputs)]
    for block in block_counts(stage.model):
        calls += block.type.kernel_calls(stage.model, inputs)
    calls += _losses(stage.model.vocab_size, inputs)
    for op, arguments in calls:
        if getattr(backends, OPERATION_OF[op]) == "triton":
            yield KernelCall(op, tuple(arguments.items()))


def _residual_norms(stage: StageConfig, inputs: KernelInputs) -> Iterator[KernelArguments]:
    """Yield the norms of the residual stream, and of the outputs of blocks (`norm_position`)."""
    rows = inputs.rows // (inputs.tp if stage.parallel.sequence_parallel else 1)
    shape: dict[str, int | str] = {"rows": rows, "width": stage.model.hidden_size}
    stream = {**shape, "dtype": inputs.parameter_dtype}
    outputs = {**shape, "dtype": inputs.dtype, "parameter_dtype": inputs.parameter_dtype}
    yield "rms_norm", outputs if stage.model.norm_position == "post" else stream
    yield "add_rms_norm", stream


def _losses(vocabulary: int, inputs: KernelInputs) -> Iterator[KernelArguments]:
    width, ranks = pad(vocabulary, inputs.tp) // inputs.tp, inputs.tp
    for rank in range(ranks):
        shape = {"rows": inputs.rows, "width": width, "real": real_rows(vocabulary, width, rank)}
        yield "cross_entropy", {**shape, "ranks": ranks, "dtype": inputs.dtype}
