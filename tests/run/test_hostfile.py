"""A hostfile says where commands run: one that everybody can change is refused."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launchers" / "deepspeed.sh"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH, whose `deepspeed` shows what it was given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = folder / "deepspeed"
    fake.write_text('#!/bin/sh\necho "started: $*"\n')
    fake.chmod(0o755)
    return folder


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts" / "hostfile"
    path.parent.mkdir(mode=0o755)
    path.write_text("first slots=8\n")
    path.chmod(0o644)
    return path


def launch(tools: Path, hostfile: Path) -> subprocess.CompletedProcess[str]:
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), str(hostfile), "run.yaml", "--set", "seed=1"],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_refused(tools: Path, hostfile: Path, said: str) -> None:
    done = launch(tools, hostfile)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def assert_started(tools: Path, hostfile: Path) -> None:
    done = launch(tools, hostfile)
    words = f"--hostfile {hostfile} --module megagrow train run.yaml --set seed=1"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"started: {words}\n", "")


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o664])
def test_a_hostfile_of_its_owner_is_used(tools: Path, hostfile: Path, mode: int) -> None:
    hostfile.chmod(mode)
    assert_started(tools, hostfile)


@pytest.mark.parametrize("mode", [0o666, 0o646, 0o602, 0o777])
def test_a_hostfile_that_everybody_may_write_is_refused(
    tools: Path, hostfile: Path, mode: int
) -> None:
    hostfile.chmod(mode)
    assert_refused(tools, hostfile, f"{hostfile}: the hostfile is world-writable; run chmod o-w")


def test_a_hostfile_that_everybody_may_replace_is_refused(tools: Path, hostfile: Path) -> None:
    hostfile.parent.chmod(0o777)
    assert_refused(tools, hostfile, f"{hostfile}: its folder is world-writable; run chmod o-w")
    hostfile.parent.chmod(0o1777)  # as /tmp: there only the owner may
    assert_started(tools, hostfile)


def test_a_link_is_followed(tools: Path, hostfile: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(hostfile)
    assert_started(tools, link)
    hostfile.parent.chmod(0o777)
    assert_refused(tools, link, f"{hostfile}: its folder is world-writable")
    hostfile.parent.chmod(0o755)
    hostfile.chmod(0o666)
    assert_refused(tools, link, "the hostfile is world-writable")


def test_a_hostfile_that_is_not_there_is_named(tools: Path, hostfile: Path) -> None:
    assert_refused(tools, hostfile.parent, "no such hostfile")
    hostfile.unlink()
    assert_refused(tools, hostfile, f"{hostfile}: no such hostfile")
