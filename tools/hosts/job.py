"""A job on several hosts (hosts.py): its run file, its launchers, and what is seen of it."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tools.faults.run import LENGTH, MODEL, look
from tools.hosts.namespaces import NETWORK, Host

BASE_STEPS, STEPS, INTERVAL = 12, 40, 5
BATCH = 12
"""Sequences of a step: as many for each rank on 1, 2, 3, 4 or 6 ranks."""
HANG_TIMEOUT = 4.0
PORT = 29500
SECONDS = 300.0
"""In which every job here has ended."""
ALONE = ("OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES=", "DS_ACCELERATOR=cpu")
"""Ranks on CPUs, one thread each, also beside a GPU."""


def run_of(corpus: Path, output: Path, zero_stage: int = 2, **changes: Any) -> dict[str, Any]:
    """What stands in the run file: a small model that doubles its layers after BASE_STEPS."""
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
class Ended:
    """How a job ended."""

    codes: dict[str, int]
    """Exit code of each host's launcher."""
    said: dict[str, list[str]]
    """What each host has printed, line by line."""
    seconds: float
    """From what was waited for until the last launcher had ended."""


class Job:
    """A run on hosts, with `slots` ranks on each; the `deepspeed` launcher starts them.

    Without `doors` there is a launcher on each host, as a scheduler would start them: that needs no
    ssh. With the folder of an `ssh` (hosts_ssh.py) launchers/deepspeed.sh on the first host reaches
    the others.
    """

    def __init__(
        self, hosts: Sequence[Host], slots: int, run: dict[str, Any], doors: Path | None = None
    ) -> None:
        self.output = Path(run["output_dir"])
        self._path = self.output.with_suffix(".yaml")
        self._path.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
        self._hostfile = self.output.with_suffix(".hosts")
        lines = [f"{host.name} slots={slots}\n" for host in hosts]
        self._hostfile.write_text("".join(lines), encoding="ascii")
        self._launchers: dict[str, subprocess.Popen[str]] = {}
        self._starts = len(look(self.output).starts)
        self.by_ssh = doors is not None
        if doors is not None:
            self._launch(hosts[0], *self._over_ssh(doors))
        else:
            for number, host in enumerate(hosts):
                self._launch(host, *self._by_itself(number, hosts[0].name))

    def _by_itself(self, number: int, first: str) -> list[object]:
        """The launcher of one host."""
        launcher = Path(sys.executable).with_name("deepspeed")
        command = ["env", *ALONE, launcher, "--hostfile", self._hostfile, "--no_ssh"]
        command += ["--node_rank", number, "--master_addr", first]
        command += ["--master_port", PORT, "--log_level", "error"]
        return [*command, "--module", "megagrow", "train", self._path]

    def _over_ssh(self, doors: Path) -> list[object]:
        """The launcher of all hosts; what the ranks need of its environment stands in a file."""
        own = self.output.with_suffix(".deepspeed_env")
        lines = [f"{line}\n" for line in (*ALONE, NETWORK)]
        own.write_text("".join(lines), encoding="ascii")
        programs = Path(sys.executable).parent
        begin = f'PATH={doors}:{programs}:$PATH exec bash launchers/deepspeed.sh "$@"'
        setting = ("env", *ALONE, f"DS_ENV_FILE={own}")
        return [*setting, "sh", "-c", begin, "sh", self._hostfile, self._path]

    def _launch(self, host: Host, *command: object) -> None:
        with self._log(host.name).open("wb") as log:
            self._launchers[host.name] = host.start(*command, stdout=log, stderr=log)

    def interrupt(self, host: Host) -> None:
        """What Ctrl-C does to the launcher that was started on a host."""
        host.start("pkill", "-INT", "-f", f"deepspeed --hostfile {self._hostfile}").wait()

    def wait_for_step(self, step: int) -> None:
        """Returns when this start of the run has written down a step."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            seen = look(self.output)
            if len(seen.starts) > self._starts and seen.step >= step:
                return
            if all(launcher.poll() is not None for launcher in self._launchers.values()):
                break
            time.sleep(0.01)
        raise AssertionError(f"never came to step {step}: {self._said()}")

    def finish(self) -> Ended:
        """How it ends."""
        start = time.monotonic()
        codes = {}
        for name, launcher in self._launchers.items():
            try:
                codes[name] = launcher.wait(max(1.0, start + SECONDS - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name} hangs: {self._said()}") from None
        return Ended(codes, self._said(), time.monotonic() - start)

    def _log(self, host: str) -> Path:
        return self.output.with_suffix(f".{host}.log")

    def _said(self) -> dict[str, list[str]]:
        return {name: self._log(name).read_text().splitlines() for name in self._launchers}


def records(output: Path, kind: str) -> list[dict[str, Any]]:
    """What a run has written down, of one kind."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(output: Path) -> list[float]:
    """The loss of each step of a run; raises AssertionError unless it is whole and has grown."""
    steps = records(output, "train")
    if [record["step"] for record in steps] != list(range(1, STEPS + 1)):
        raise AssertionError(f"{output}: steps {[record['step'] for record in steps]}")
    if [record["step"] for record in records(output, "growth")] != [BASE_STEPS]:
        raise AssertionError(f"{output}: not grown after step {BASE_STEPS}")
    return [record["loss"] for record in steps]


def furthest(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference between the losses of two runs."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
