"""The real command lines, each in processes of its own: the same run file, the same losses."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megagrow.config.schema import RunConfig
from tests.helpers.jobs import records, write_run
from tests.helpers.run.launchers import ENVIRONMENT, SECONDS, start
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run
from tests.helpers.spawn import free_port

pytestmark = [pytest.mark.dist, pytest.mark.slow]

OUR_LINES = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| (rank 0 \| )?"
    r"((run test|step \d|corpus \S+) \| .*|warning: .* no tokenizer is recorded .*)"
)
LATE_RANK_0 = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(4)\n"


def grown_run(folder: Path, name: str) -> RunConfig:
    deep = MODEL | {"num_hidden_layers": 4}
    stages = [
        {"tokens": 3 * STEP_TOKENS},
        {"model": deep, "tokens": 3 * STEP_TOKENS, "growth": {"operator": "direct_depth"}},
    ]
    return make_run(folder, stages, output_dir=folder / name, validation={"tokens": 64})


def assert_clean(process: subprocess.Popen[str]) -> None:
    """It ends well, and prints nothing but what a user should read."""
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, out + err
    assert err == ""
    for line in out.splitlines():
        assert OUR_LINES.fullmatch(line), line


def losses(run: RunConfig) -> list[float]:
    found = [loss for (loss,) in records(run, "train", ["loss"])]
    assert len(found) == 6
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """The losses without a launcher: one process."""
    run = grown_run(folder, "alone")
    assert_clean(
        start(sys.executable, "-m", "megagrow", "train", write_run(folder / "alone.yaml", run))
    )
    return losses(run)


def test_torchrun_on_four_ranks(folder: Path, alone: list[float]) -> None:
    run = grown_run(folder, "torchrun")
    path = write_run(folder / "torchrun.yaml", run)
    assert_clean(start("bash", "launchers/local.sh", 4, path))
    assert losses(run) == pytest.approx(alone, rel=1e-5)


def test_deepspeed_on_two_ranks_shows_the_live_line(folder: Path, alone: list[float]) -> None:
    run = grown_run(folder, "deepspeed")
    path = write_run(folder / "deepspeed.yaml", run)
    terminal, end = pty.openpty()
    words = ("--num_gpus", 2, "--master_port", free_port(), "--log_level", "error")
    process = start("deepspeed", *words, "--module", "megagrow", "train", path, stdout=end)
    os.close(end)
    shown = read_terminal(terminal)
    _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (0, ""), shown
    assert losses(run) == pytest.approx(alone, rel=1e-5)
    assert re.search(r"step 6 \| loss 4\.\d+ \| .* \| ETA 0s", shown), shown


def read_terminal(terminal: int) -> str:
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 1 << 16)
        except OSError:  # nobody writes to it any more
            os.close(terminal)
            return shown.decode()


def test_deepspeed_on_two_hosts_of_a_hostfile(folder: Path, alone: list[float]) -> None:
    run = grown_run(folder, "hosts")
    path = write_run(folder / "hosts.yaml", run)
    hosts = folder / "hostfile"
    hosts.write_text("first slots=1\nsecond slots=1\n")
    port = free_port()
    # Without ssh, as under a scheduler that starts the command on each host; here all are this one.
    processes = [
        start(
            *("deepspeed", "--hostfile", hosts, "--no_ssh", "--node_rank", node),
            *("--master_addr", "127.0.0.1", "--master_port", port, "--log_level", "error"),
            *("--module", "megagrow", "train", path),
        )
        for node in range(2)
    ]
    for process in processes:
        assert_clean(process)
    assert losses(run) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_mistake_is_told_once_though_rank_0_comes_last(
    folder: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    late = folder / "late"
    late.mkdir(exist_ok=True)
    (late / "sitecustomize.py").write_text(LATE_RANK_0)
    paths = os.pathsep.join([str(late), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", paths)
    path = write_run(folder / "late.yaml", grown_run(folder, "late-run"))
    words = {
        "torchrun": ("--standalone", "--nproc-per-node", 2, "-m"),
        "deepspeed": ("--num_gpus", 2, "--master_port", free_port(), "--module"),
    }[launcher]
    process = start(launcher, *words, "megagrow", "train", path, "--set", "seeed=1")
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == {"torchrun": 1, "deepspeed": 2}[launcher], out + err
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    message = "error: --set seeed=1: unknown key 'seeed'; did you mean 'seed'?"
    assert told == [message]
    if launcher == "torchrun":  # it prints a traceback of its own, then the message
        assert [line.strip("=") for line in err.splitlines()[-2:]] == [
            f"  traceback : {message}",
            "",
        ]
    assert not (folder / "late-run").exists()
