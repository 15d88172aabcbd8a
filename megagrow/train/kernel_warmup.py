"""Kernel calls of a stage, and their compilation during the stage before it.

`stage_kernels` lists the kernels and tensor shapes of a stage; `WarmUp` compiles them in a
subprocess, so that a growth does not wait for the compiler.
"""

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch

from megagrow.config.schema import RunConfig, StageConfig
from megagrow.model.backends import Backends, choose, kernel_workload
from megagrow.model.machine import machine_of
from megagrow.model.ops import Ops, make_ops
from megagrow.parallel.sharding import pad, real_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelCall:
    """One op, forward and backward, with the arguments of `megagrow_kernels.calls`."""

    op: str
    arguments: tuple[tuple[str, int | str | None], ...]

    def as_json(self) -> list[Any]:
        """Return the input format of `megagrow_kernels.warm_up`."""
        return [self.op, dict(self.arguments)]


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
        yield _call("attention", **heads, dtype=low)
    if backends.loss == "triton":
        width = pad(model.vocab_size, tp) // tp
        for rank in range(tp):
            real = real_rows(model.vocab_size, width, rank)
            yield _call("cross_entropy", rows=rows, width=width, real=real, ranks=tp, dtype=low)


def _call(op: str, **arguments: int | str | None) -> KernelCall:
    return KernelCall(op, tuple(arguments.items()))


class WarmUp:
    """At most one compiler process; a context manager that ends it."""

    def __init__(self, device: torch.device, local_rank: int) -> None:
        self._device = device
        self._first_here = local_rank == 0
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def __enter__(self) -> "WarmUp":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def prepare(self, run: RunConfig, index: int) -> None:
        """Start compiling the kernels of stage `index` + 1, if it uses Triton on a GPU."""
        self.stop()
        if self._first_here and self._device.type == "cuda" and index + 1 < len(run.stages):
            machine = machine_of(self._device)
            work = kernel_workload(run, index + 1, self._device)
            following = run.stages[index + 1]
            backends = choose(following.kernels, machine, work)
            calls = stage_kernels(following, run.data.sequence_length, work.dtype, backends)
            if calls:
                self.start(calls, machine.capability)

    def start(self, calls: tuple[KernelCall, ...], capability: int) -> None:
        """Start compiling `calls` for GPUs of a compute capability."""
        command = [sys.executable, "-m", "megagrow_kernels.warm_up", str(capability)]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - see stop
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                text=True,
            )
            assert self._process.stdin is not None
            with self._process.stdin as stdin:
                json.dump([call.as_json() for call in calls], stdin)
        except OSError as error:
            logger.warning("the next stage's kernels are not precompiled: %s", error)

    def report(self) -> None:
        """Warn before a growth if the kernels are not compiled, with the reason."""
        if self._process is None or self._errors is None:
            return
        code = self._process.poll()
        if code is None:
            logger.warning("the next stage's kernels are still being compiled")
        elif code != 0:
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or [f"exit code {code}"]
            logger.warning("the next stage's kernels could not be compiled: %s", lines[-1])

    def wait(self) -> None:
        """Wait until all kernels are compiled."""
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """End the compiler process, if any."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None


def stage_ops(run: RunConfig, index: int, device: torch.device) -> Ops:
    """Return the operations of one stage. Raises ResourceError if one cannot run here."""
    machine, work = machine_of(device), kernel_workload(run, index, device)
    backends = choose(run.stages[index].kernels, machine, work, f"stages.{index}.kernels")
    return make_ops(backends, machine, work)


def check_kernels(run: RunConfig, device: torch.device) -> None:
    """Raise ResourceError if an operation of any stage cannot run here."""
    for index in range(len(run.stages)):
        stage_ops(run, index, device)
