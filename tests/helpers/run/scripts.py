"""Launchers run where the programs of a cluster are pretended by scripts."""

import os
import subprocess
from pathlib import Path

LAUNCHERS = Path(__file__).resolve().parents[3] / "launchers"
FAKES = {
    # Tells its rank and its words, then ends with the code that CODES has for the rank.
    "python": """
        echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, at $MASTER_ADDR:$MASTER_PORT: $*" \\
            >>"$LOG"
        codes=($CODES)
        exit "${codes[$RANK]}"
    """,
    # Two tasks, one after the other; as the real one it ends with the highest code.
    "srun": """
        words=srun
        while [[ $1 == --* ]]; do words+=" $1" && shift; done
        echo "$words" >>"$LOG"
        worst=0
        for task in 0 1; do
            SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" || code=$?
            if ((${code:-0} > worst)); then worst=$code; fi
        done
        exit "$worst"
    """,
    "scontrol": """
        echo "scontrol $*" >>"$LOG"
        case "$1 $2" in
        "show hostnames") printf '%s\\n' node7 node8 ;;
        "show job") echo "   JobState=$STATE Reason=None" ;;
        esac
    """,
}


def pretended_cluster(folder: Path) -> dict[str, str]:
    """An environment in which the programs of FAKES are the first on PATH."""
    programs = folder / "bin"
    programs.mkdir()
    for name, script in FAKES.items():
        write_program(programs / name, script)
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(folder / "log"),
        "CODES": "0 0",
        "STATE": "RUNNING",
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{script}", encoding="utf-8")
    path.chmod(0o755)


def launch(
    script: str, *words: str, environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCHERS / script), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
