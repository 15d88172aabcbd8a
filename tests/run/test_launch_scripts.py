"""The launchers: what they would start, what they do with exit codes and signals, their style."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.jobs import Job, write_run
from tests.helpers.run.scripts import LAUNCHERS, launch, pretended_cluster, write_program
from tests.helpers.runs import STEP_TOKENS, make_run

NOT_STARTED = ("torchrun", "deepspeed", "srun", "python", "scontrol")


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    return pretended_cluster(tmp_path)


TRAIN = "-m megagrow train 'a run.yaml' --set seed=1"
DRY_RUNS = {
    "local.sh": (
        ["4"],
        [f"env OMP_NUM_THREADS=3 torchrun --standalone --nproc-per-node 4 {TRAIN}"],
    ),
    "deepspeed.sh": (
        ["hosts"],
        [
            "env 'PDSH_SSH_ARGS_APPEND=-o ServerAliveInterval=15 -o ServerAliveCountMax=4' "
            f"deepspeed --hostfile hosts --module {TRAIN.split(' ', 1)[1]}"
        ],
    ),
    "elastic.sh": (
        ["2:4", "8", "first"],
        [
            "torchrun --nnodes 2:4 --nproc-per-node 8 --rdzv-backend c10d "
            f"--rdzv-endpoint first:29400 --rdzv-id 'a run' --max-restarts 10 {TRAIN}"
        ],
    ),
    "ranks.sh": (
        ["2", "3", "1", "first"],
        [
            f"env RANK={2 + local} LOCAL_RANK={local} WORLD_SIZE=6 MASTER_ADDR=first "
            f"MASTER_PORT=29500 python -m megagrow train --stop-code 75 'a run.yaml' --set seed=1"
            for local in (0, 1)
        ],
    ),
    "slurm.sh": (
        [],
        [
            "srun --kill-on-bad-exit=0 --wait=60 env MASTER_ADDR=FIRST_HOST MASTER_PORT=29500 "
            "bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS "
            "exec \"$@\"' rank python -m megagrow train --stop-code 75 'a run.yaml' --set seed=1"
        ],
    ),
}
"""Launcher -> its own words, and the commands that it prints, as a shell reads them."""


def as_read(line: str) -> list[str]:
    """The words of a command, read by a shell."""
    told = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return told.stdout.split("\0")[:-1]


@pytest.mark.parametrize("script", DRY_RUNS)
def test_a_dry_run_prints_the_command_and_starts_nothing(tmp_path: Path, script: str) -> None:
    for name in NOT_STARTED:
        write_program(tmp_path / name, f"touch {tmp_path}/started\n")
    hosts = tmp_path / "hosts"
    hosts.write_text("first slots=8\n")
    hosts.chmod(0o644)
    own, expected = DRY_RUNS[script]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    words = ["--dry-run", *own, "a run.yaml", "--set", "seed=1"]
    done = launch(
        script, *words, environment={"PATH": path, "OMP_NUM_THREADS": "3"}, folder=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [as_read(line) for line in done.stdout.splitlines()] == [as_read(e) for e in expected]
    assert not (tmp_path / "started").exists()


def test_every_launcher_has_a_dry_run() -> None:
    scripts = {path.name for path in LAUNCHERS.glob("*.sh")}
    assert scripts == {*DRY_RUNS, "demo.sh"}, "the demo is no launcher of runs"


@pytest.mark.parametrize("script", DRY_RUNS)
def test_without_words_the_usage_is_told(tmp_path: Path, script: str) -> None:
    environment = {"PATH": os.environ["PATH"]}
    done = launch(script, environment=environment, folder=tmp_path)
    assert done.returncode != 0 and "usage: " in done.stderr and script in done.stderr


def test_shellcheck_finds_nothing() -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("shellcheck", path=path)
    if program is None:
        pytest.skip("shellcheck is not installed (the extra `test` has it)")
    scripts = sorted(map(str, LAUNCHERS.glob("*.sh")))
    found = subprocess.run([program, *scripts], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize(
    ("codes", "told"), [("0 0", 0), ("5 1", 1), ("2 2", 2), ("0 75", 75), ("5 137", 5)]
)
def test_ranks_end_with_the_cause(
    cluster: dict[str, str], tmp_path: Path, codes: str, told: int
) -> None:
    environment = cluster | {"CODES": codes}
    done = launch("ranks.sh", "2", "1", "0", "h", "r", environment=environment, folder=tmp_path)
    assert done.returncode == told, done.stderr


def test_ranks_get_signals_and_are_waited_for(cluster: dict[str, str], tmp_path: Path) -> None:
    stopping = """
        trap 'sleep 0.3; echo saved >>"$LOG"; exit 75' TERM
        echo ready >>"$LOG"
        while :; do sleep 0.02; done
    """
    write_program(tmp_path / "bin" / "python", stopping)
    words = ["bash", str(LAUNCHERS / "ranks.sh"), "2", "1", "0", "h", "r"]
    log = Path(cluster["LOG"])
    with subprocess.Popen(words, env=cluster) as process:
        wait_for_lines(log, ["ready"] * 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
    assert log.read_text().splitlines() == ["ready"] * 2 + ["saved"] * 2


def wait_for_lines(path: Path, lines: list[str]) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() or path.read_text().splitlines() != lines:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.dist
def test_a_stop_ends_with_the_code_that_was_asked_for(tmp_path: Path) -> None:
    """The basis of the launchers: a run that a signal stopped differs from one that is done."""
    run = make_run(tmp_path, [{"tokens": 400 * STEP_TOKENS}])
    path = write_run(tmp_path / "run.yaml", run)
    words = ["train", str(path), "--stop-code", "75"]
    job = Job(tmp_path / "first", 2, words)
    metrics = run.output_dir / "metrics.jsonl"
    job.wait_for(lambda: metrics.exists() and metrics.read_text().count('"train"') > 3)
    job.signal(signal.SIGUSR1)
    assert job.finish().codes == [75, 75]
    assert '"stopped": "SIGUSR1"' in metrics.read_text().splitlines()[-1]
    short = make_run(tmp_path, [{"tokens": 2 * STEP_TOKENS}], output_dir=tmp_path / "short")
    path = write_run(tmp_path / "short.yaml", short)
    words = ["train", str(path), "--stop-code", "75"]
    assert Job(tmp_path / "second", 2, words).finish().codes == [0, 0]
