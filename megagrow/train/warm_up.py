"""Kernels of the next stage, compiled beside the training of this one.

A growth changes the shapes that kernels are compiled for. So each host compiles those of the next
model in a process of its own, at a low priority and without touching a GPU, into Triton's
cache on disk: after the growth they are only loaded from there. Nothing depends on it: whatever is
not compiled by then is compiled when it is first used.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO

import torch

from megagrow.config.schema import RunConfig
from megagrow.model.backends import choose, work_of
from megagrow.model.machine import machine_of
from megagrow.train.kernel_warmup import KernelCall, stage_kernels


class WarmUp:
    """At most one process that compiles; a context that does not outlive it."""

    def __init__(self, device: torch.device, local_rank: int, say: Callable[[str], None]) -> None:
        self._device = device
        self._first_here = local_rank == 0
        self._say = say
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
            self._say(f"warning: the next stage's kernels are not compiled beforehand: {error}")

    def report(self) -> None:
        """Call before a growth: says what is not compiled, and why."""
        if self._process is None or self._errors is None:
            return
        code = self._process.poll()
        if code is None:
            self._say("warning: the next stage's kernels are still being compiled")
        elif code != 0:
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or [f"exit code {code}"]
            self._say(f"warning: the next stage's kernels could not be compiled: {lines[-1]}")

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
