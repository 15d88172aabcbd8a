"""Which kernels a stage launches, on tensors of which shapes: a pure list."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megagrow.config.schema import StageConfig
from megagrow.model.backends import Backends
from megagrow.parallel.sharding import pad, real_rows


@dataclass(frozen=True)
class KernelCall:
    """One op, forward and backward, as `megagrow_kernels.calls` makes it of these arguments."""

    op: str
    arguments: tuple[tuple[str, int | str | None], ...]

    def as_json(self) -> list[Any]:
        """For `megagrow_kernels.warm_up`."""
        return [self.op, dict(self.arguments)]


def stage_kernels(
    stage: StageConfig, sequence_length: int, dtype: torch.dtype, backends: Backends
) -> tuple[KernelCall, ...]:
    """All calls of Triton kernels in a stage, each once; none where no backend is Triton's.

    `dtype` is that of the forward and backward pass. Calls of all tensor-parallel ranks are among
    them, and only those: the global batch and the data-parallel size change no kernel.
    """
    return tuple(dict.fromkeys(_calls(stage, sequence_length, dtype, backends)))


def _calls(
    stage: StageConfig, sequence: int, dtype: torch.dtype, backends: Backends
) -> Iterator[KernelCall]:
    model, parallel = stage.model, stage.parallel
    tp, batch = parallel.tensor_model_parallel_size, stage.batch.micro_batch_size
    rows = batch * sequence
    low = str(dtype).removeprefix("torch.")
    # Without ZeRO, bf16 is torch's autocast: what is no matrix product stays in fp32.
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
        yield _call("attention", **heads, dtype=low)
    if backends.loss == "triton":
        width = pad(model.vocab_size, tp) // tp
        for rank in range(tp):
            real = real_rows(model.vocab_size, width, rank)
            yield _call("cross_entropy", rows=rows, width=width, real=real, ranks=tp, dtype=low)


def _call(op: str, **arguments: int | str | None) -> KernelCall:
    return KernelCall(op, tuple(arguments.items()))
