"""Which kernels a stage launches, on tensors of which shapes: a pure list."""

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
from megagrow.model.backends import Backends, choose, work_of
from megagrow.model.machine import machine_of
from megagrow.model.ops import Ops, make_ops
from megagrow.parallel.sharding import pad, real_rows

logger = logging.getLogger(__name__)


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


class WarmUp:
    """At most one process that compiles; a context that does not outlive it."""

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
        """Call when a stage of a run begins: compiles for the stage after it, where there is one
        and its backends are Triton's on a GPU."""
        self.stop()
        if self._first_here and self._device.type == "cuda" and index + 1 < len(run.stages):
            machine = machine_of(self._device)
            work = work_of(run, index + 1, self._device)
            following = run.stages[index + 1]
            backends = choose(following.kernels, machine, work)
            calls = stage_kernels(following, run.data.sequence_length, work.dtype, backends)
            if calls:
                self.start(calls, machine.capability)

    def start(self, calls: tuple[KernelCall, ...], capability: int) -> None:
        """Begins to compile calls for GPUs of a compute capability."""
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
            with self._process.stdin as told:
                json.dump([call.as_json() for call in calls], told)
        except OSError as error:
            logger.warning("the next stage's kernels are not precompiled: %s", error)

    def report(self) -> None:
        """Call before a growth: says what is not compiled, and why."""
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
        """Until all is compiled."""
        if self._process is not None:
            self._process.wait()

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None


def stage_ops(run: RunConfig, index: int, device: torch.device) -> Ops:
    """The operations of one stage. InputError, naming the key, where one cannot run here."""
    machine, work = machine_of(device), work_of(run, index, device)
    backends = choose(run.stages[index].kernels, machine, work, f"stages.{index}.kernels")
    return make_ops(backends, machine, work)


def check_kernels(run: RunConfig, device: torch.device) -> None:
    """Before time is spent: InputError if an operation of any stage cannot run here."""
    for index in range(len(run.stages)):
        stage_ops(run, index, device)
