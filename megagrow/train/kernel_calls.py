"""Kernel calls of a stage: the Triton kernels that it launches and their tensor shapes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from megagrow.config.schema import StageConfig
from megagrow.model.backends import Backends
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
    arguments: tuple[tuple[str, int | str | None], ...]

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
    stage: StageConfig, sequence_length: int, dtype: torch.dtype, backends: Backends
) -> tuple[KernelCall, ...]:
    """Return the distinct Triton kernel calls of a stage; empty if no backend is Triton.

    The calls cover all tensor-parallel ranks. The global batch and the data-parallel size do not
    affect any kernel.

    Args:
        stage: the stage.
        sequence_length: tokens per sequence.
        dtype: dtype of the forward and backward pass.
        backends: backend of each operation.
    """
    return tuple(dict.fromkeys(_calls(stage, sequence_length, dtype, backends)))


def _calls(
    stage: StageConfig, sequence: int, dtype: torch.dtype, backends: Backends
) -> Iterator[KernelCall]:
    model, parallel = stage.model, stage.parallel
    tp, batch = parallel.tensor_model_parallel_size, stage.batch.micro_batch_size
    rows = batch * sequence
    low = str(dtype).removeprefix("torch.")
    # Without ZeRO, bf16 is torch's autocast: only matrix products are in bf16.
    wide = low if parallel.zero_stage > 0 else "float32"
    heads = {
        "batch": batch,
        "sequence": sequence,
        "heads": model.num_attention_heads // tp,
        "groups": model.num_key_value_heads // tp,
        "head_dim": model.head_dim,
    }
    if backends.norm == "triton":
        seen = rows // tp if parallel.sequence_parallel else rows
        for op in ("rms_norm", "add_rms_norm"):
            yield _call(op, rows=seen, width=model.hidden_size, dtype=wide)
    if backends.pointwise == "triton":
        yield _call("rope", **heads, dtype=low, table_dtype=wide)
        yield _call("swiglu", rows=rows, width=model.intermediate_size // tp, dtype=low)
    if backends.attention == "triton":
        for window in model.attention_windows:
            limit = {} if window is None else {"window": window}
            yield _call("attention", **heads, dtype=low, **limit)
    if backends.loss == "triton":
        width = pad(model.vocab_size, tp) // tp
        for rank in range(tp):
            real = real_rows(model.vocab_size, width, rank)
            yield _call("cross_entropy", rows=rows, width=width, real=real, ranks=tp, dtype=low)


def _call(op: str, **arguments: int | str | None) -> KernelCall:
    return KernelCall(op, tuple(arguments.items()))
