"""launchers/slurm.sh: what it starts, and what becomes of the job by how the ranks have ended."""

from pathlib import Path

import pytest

from tests.helpers.run.scripts import launch, pretended_cluster


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    return pretended_cluster(tmp_path)


def slurm(
    environment: dict[str, str], folder: Path, codes: str, **changes: str
) -> tuple[int, str, list[str]]:
    """Exit code, what it says, and what it asked of scontrol after the run."""
    log = Path(environment["LOG"])
    log.unlink(missing_ok=True)
    given = environment | {"CODES": codes} | changes
    done = launch("slurm.sh", "run.yaml", "--set", "a=1", environment=given, folder=folder)
    asked = [line for line in log.read_text().splitlines() if line.startswith("scontrol ")]
    assert asked.pop(0) == "scontrol show hostnames node[7-8]"
    return done.returncode, done.stderr, asked


LOOKED = ["scontrol show job 12"]
REQUEUED = [*LOOKED, "scontrol requeue 12"]


def test_slurm_starts_each_rank_with_what_it_must_know(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    assert slurm(cluster, tmp_path, "0 0") == (0, "", [])
    words = "-m megagrow train --stop-code 75 run.yaml --set a=1"
    assert Path(cluster["LOG"]).read_text().splitlines()[1:] == [
        "srun --kill-on-bad-exit=0 --wait=60",
        f"rank 0 of 2, local 0, at node7:29512: {words}",
        f"rank 1 of 2, local 1, at node7:29512: {words}",
    ]


def test_slurm_requeues_after_a_stop_as_often_as_it_takes(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    for _ in range(5):
        code, said, asked = slurm(cluster, tmp_path, "75 75")
        assert (code, asked) == (0, REQUEUED)
        assert "stopped by a signal; requeueing job 12" in said
    assert not list(tmp_path.glob("*.failures"))


@pytest.mark.parametrize("code", [1, 2, 3])
def test_slurm_does_not_requeue_what_would_come_again(
    cluster: dict[str, str], tmp_path: Path, code: int
) -> None:
    assert slurm(cluster, tmp_path, f"{code} {code}") == (code, "", LOOKED)


def test_slurm_requeues_after_a_lost_rank_a_few_times(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    for codes in ("5 137", "4 4"):
        code, said, asked = slurm(cluster, tmp_path, codes, MAX_FAILURES="2")
        assert (code, asked) == (0, REQUEUED), said
    assert slurm(cluster, tmp_path, "75 75", MAX_FAILURES="2")[2] == REQUEUED, "a stop is none"
    code, said, asked = slurm(cluster, tmp_path, "5 5", MAX_FAILURES="2")
    assert (code, asked) == (5, LOOKED)
    assert "exit code 5 after 2 earlier failures, see megagrow-12.failures" in said
    noted = (tmp_path / "megagrow-12.failures").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in noted] == [
        f"exit code {code} on node[7-8]" for code in (137, 4, 5)
    ]


@pytest.mark.parametrize("codes", ["75 75", "143 143", "4 4"])
def test_slurm_leaves_a_job_alone_that_is_being_ended(
    cluster: dict[str, str], tmp_path: Path, codes: str
) -> None:
    # By scancel, a preemption, `scontrol requeue` or a lost host, SLURM 22.05 has said COMPLETING.
    code, said, asked = slurm(cluster, tmp_path, codes, STATE="COMPLETING")
    assert (f"{code} {code}", asked) == (codes, LOOKED)
    assert "job 12 is being terminated" in said
    assert not list(tmp_path.glob("*.failures"))


def test_slurm_requeues_while_the_warning_is_still_on_its_way(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    assert slurm(cluster, tmp_path, "75 75", STATE="SIGNALING")[2] == REQUEUED


def test_slurm_tells_srun_how_many_cpus_a_rank_has(cluster: dict[str, str], tmp_path: Path) -> None:
    # srun 22.05 does not look at SLURM_CPUS_PER_TASK, which sbatch sets.
    assert slurm(cluster, tmp_path, "0 0", SLURM_CPUS_PER_TASK="12")[0] == 0
    assert (
        "srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task=12\n"
        in Path(cluster["LOG"]).read_text()
    )


def test_slurm_takes_the_port_that_it_is_given(cluster: dict[str, str], tmp_path: Path) -> None:
    assert slurm(cluster, tmp_path, "0 0", MASTER_PORT="4000")[0] == 0
    assert "at node7:4000: " in Path(cluster["LOG"]).read_text()
