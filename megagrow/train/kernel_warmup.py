"""Compilation of a stage's kernels during the stage before it, in a subprocess.

A growth then does not wait for the compiler.
"""

import json
import logging
import subprocess
import sys
import tempfile
from typing import IO

import torch

from megagrow.config.schema import RunConfig
from megagrow.train.kernel_calls import Checks, KernelCall
from megagrow.train.kernel_selection import select_backends, triton_calls

logger = logging.getLogger(__name__)


class WarmUp:
    """At most one compiler process; a context manager that ends it."""

    def __init__(self, device: torch.device, local_rank: int, checks: Checks) -> None:
        self._device, self._checks = device, checks
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
            selected = select_backends(run, index + 1, self._device, self._checks)
            calls = triton_calls(run, index + 1, selected)
            if calls:
                self.start(calls, selected.machine.capability)

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
