"""Job on several hosts: run file, launchers, and results."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools.faults.run import LENGTH, MODEL, read_snapshot
from tools.hosts.namespaces import NETWORK, Host

BASE_STEPS, STEPS, INTERVAL = 12, 40, 5
BATCH = 12
"""Sequences per step; divisible by 1, 2, 3, 4 and 6 ranks."""
HANG_TIMEOUT = 4.0
PORT = 29500
TIMEOUT = 300.0
"""Seconds until each job must have ended."""
CPU_SETTINGS = ("OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES=", "DS_ACCELERATOR=cpu")
"""Environment of ranks on CPUs with one thread each, also on machines with a GPU."""


def run_of(corpus: Path, output: Path, zero_stage: int = 2, **changes: Any) -> dict[str, Any]:
    """Return the contents of the run file: a model that doubles its layers after BASE_STEPS."""
    tokens = BATCH * LENGTH
    deep = MODEL | {"num_hidden_layers": 2 * MODEL["num_hidden_layers"]}
    growth = {"operator": "direct_depth"}
    return {
        "name": output.name,
        "output_dir": str(output),
        "data": {"train": [{"path": str(corpus)}], "sequence_length": LENGTH},
        "parallel": {"zero_stage": zero_stage},
        "batch": {"global_batch_size": BATCH, "micro_batch_size": 1},
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 3},
        "checkpoint": {"interval": INTERVAL, "background": False},
        "validation": {"tokens": 64},
        "guards": {"hang_timeout": HANG_TIMEOUT},
        "logging": {"tensorboard": False},
        "stages": [
            {"model": MODEL, "tokens": BASE_STEPS * tokens},
            {"model": deep, "tokens": (STEPS - BASE_STEPS) * tokens, "growth": growth},
        ],
        **changes,
    }


@dataclass(frozen=True)
class JobResult:
    """Exit codes, output and duration of a job."""

    codes: dict[str, int]
    """Host -> exit code of its launcher."""
    output: dict[str, list[str]]
    """Host -> lines of its launcher."""
    seconds: float
    """Seconds from the call of `finish` to the exit of the last launcher."""


class HostJob:
    """Run on hosts with `slots` ranks each, started by the `deepspeed` launcher.

    Without `ssh_folder`, each host has its own launcher, as under a scheduler. With the folder of
    an `ssh` client (tools/hosts/ssh.py), launchers/deepspeed.sh on the first host starts all ranks.
    """

    def __init__(
        self, hosts: Sequence[Host], slots: int, run: dict[str, Any], ssh_folder: Path | None = None
    ) -> None:
        self.output = Path(run["output_dir"])
        self._path = self.output.with_suffix(".yaml")
        self._path.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
        self._hostfile = self.output.with_suffix(".hosts")
        lines = [f"{host.name} slots={slots}\n" for host in hosts]
        self._hostfile.write_text("".join(lines), encoding="ascii")
        self._launchers: dict[str, subprocess.Popen[str]] = {}
        self._starts = len(read_snapshot(self.output).starts)
        self.by_ssh = ssh_folder is not None
        if ssh_folder is not None:
            self._launch(hosts[0], *self._over_ssh(ssh_folder))
        else:
            for number, host in enumerate(hosts):
                self._launch(host, *self._per_host(number, hosts[0].name))

    def _per_host(self, number: int, first: str) -> list[object]:
        """Return the command of the launcher of one host."""
        launcher = Path(sys.executable).with_name("deepspeed")
        command = ["env", *CPU_SETTINGS, launcher, "--hostfile", self._hostfile, "--no_ssh"]
        command += ["--node_rank", number, "--master_addr", first]
        command += ["--master_port", PORT, "--log_level", "error"]
        return [*command, "--module", "megagrow", "train", self._path]

    def _over_ssh(self, ssh_folder: Path) -> list[object]:
        """Return the command of the launcher of all hosts; a file holds the ranks' environment."""
        environment = self.output.with_suffix(".deepspeed_env")
        lines = [f"{line}\n" for line in (*CPU_SETTINGS, NETWORK)]
        environment.write_text("".join(lines), encoding="ascii")
        programs = Path(sys.executable).parent
        begin = f'PATH={ssh_folder}:{programs}:$PATH exec bash launchers/deepspeed.sh "$@"'
        setting = ("env", *CPU_SETTINGS, f"DS_ENV_FILE={environment}")
        return [*setting, "sh", "-c", begin, "sh", self._hostfile, self._path]

    def _launch(self, host: Host, *command: object) -> None:
        with self._log(host.name).open("wb") as log:
            self._launchers[host.name] = host.start(*command, stdout=log, stderr=log)

    def interrupt(self, host: Host) -> None:
        """Send SIGINT to the launcher on a host, like Ctrl-C."""
        host.start("pkill", "-INT", "-f", f"deepspeed --hostfile {self._hostfile}").wait()

    def wait_for_step(self, step: int) -> None:
        """Wait until this start of the run has recorded a step. Raises AssertionError."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            snapshot = read_snapshot(self.output)
            if len(snapshot.starts) > self._starts and snapshot.step >= step:
                return
            if all(launcher.poll() is not None for launcher in self._launchers.values()):
                break
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached: {self._output()}")

    def finish(self) -> JobResult:
        """Wait for all launchers. Raises AssertionError if one hangs."""
        start = time.monotonic()
        codes = {}
        for name, launcher in self._launchers.items():
            try:
                codes[name] = launcher.wait(max(1.0, start + TIMEOUT - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name} hangs: {self._output()}") from None
        return JobResult(codes, self._output(), time.monotonic() - start)

    def _log(self, host: str) -> Path:
        return self.output.with_suffix(f".{host}.log")

    def _output(self) -> dict[str, list[str]]:
        return {name: self._log(name).read_text().splitlines() for name in self._launchers}


def records(output: Path, kind: str) -> list[dict[str, Any]]:
    """Return the metrics records of one kind."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(output: Path) -> list[float]:
    """Return the loss of each step. Raises AssertionError unless the run is complete and grown."""
    steps = records(output, "train")
    if [record["step"] for record in steps] != list(range(1, STEPS + 1)):
        raise AssertionError(f"{output}: steps {[record['step'] for record in steps]}")
    if [record["step"] for record in records(output, "growth")] != [BASE_STEPS]:
        raise AssertionError(f"{output}: not grown after step {BASE_STEPS}")
    return [record["loss"] for record in steps]


def relative_difference(actual: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference between the losses of two runs."""
    return max(abs(a - b) / abs(b) for a, b in zip(actual, expected, strict=True))
