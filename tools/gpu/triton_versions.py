"""Check the machine code of all kernels on each supported version of Triton, without a GPU.

    python tools/gpu/triton_versions.py [--triton 3.7.1] [--architecture 90] [--output FILE]

Installs each version of `CHECKED_CODE` (`megagrow/model/backends.py`) into a folder of its own,
compiles the kernels of all tile tables with it, and prints the problems of the code. Record a pair
of version and architecture without problems in `CHECKED_CODE`. See --help.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # for runs as a script

from megagrow.common.tables import markdown_table  # noqa: E402
from megagrow.model.backends import CHECKED_CODE  # noqa: E402
from megagrow.parallel.launch import cache_folder  # noqa: E402
from megagrow_kernels.compiling import SHARED_LIMIT  # noqa: E402
from tools.gpu.kernel_cases import OPS  # noqa: E402
from tools.gpu.kernel_code import (  # noqa: E402
    ARCHITECTURES,
    PROCESSES,
    CompileResult,
    inspect,
    table_jobs,
)

COLUMNS = (
    *("Triton", "GPU", "kernels", "problems", "spilling kernels", "registers, at most"),
    "shared memory, at most, of the limit",
)


def main(
    triton: Annotated[list[str] | None, typer.Option(help="Version; default: all.")] = None,
    architecture: Annotated[list[int] | None, typer.Option(help="Default: all.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="Default: all ops.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the installed versions.")] = None,
    output: Annotated[Path, typer.Option(help="The Markdown file.")] = Path("triton_versions.md"),
    processes: Annotated[int, typer.Option(min=1, help="Compilers at a time.")] = PROCESSES,
) -> None:
    """Compile the kernels with each version, write a table, and exit with 1 if there are problems.

    A version takes minutes the first time, and seconds while Triton's cache holds its kernels.
    """
    rows, problems = [], []
    for version in triton or CHECKED_CODE:
        installed = install(version, folder or cache_folder() / "triton")
        for capability in architecture or ARCHITECTURES:
            results = list(inspect(table_jobs([capability], op or OPS), processes, installed))
            rows.append(summary(version, capability, results))
            found = [f"Triton {version}: {text}" for x in results for text in x.problems()]
            print(*found, " | ".join(rows[-1]), sep="\n", flush=True)
            problems += found
            output.write_text(markdown_table(COLUMNS, rows) + "\n", encoding="utf-8")
    raise typer.Exit(1 if problems else 0)


def install(version: str, folder: Path) -> Path:
    """Install a version of Triton into a folder of its own, unless it is there; return it."""
    target = folder / version
    if not (target / f"triton-{version}.dist-info").exists():
        options = ("--quiet", "--no-deps", "--target", str(target))
        command = [sys.executable, "-m", "pip", "install", *options, f"triton=={version}"]
        subprocess.run(command, check=True)
    return target


def summary(version: str, capability: int, results: list[CompileResult]) -> list[str]:
    """Return the row of a version and a compute capability."""
    codes = {code.hash: code for result in results for code in result.codes}.values()
    spilling = sum(1 for code in codes if code.spills or code.stack or code.local)
    shared = max(code.shared for code in codes) / SHARED_LIMIT[capability]
    counts = (len(codes), sum(len(result.problems()) for result in results), spilling)
    return [
        *(version, f"sm_{capability}", *map(str, counts)),
        *(str(max(code.registers for code in codes)), f"{100 * shared:.0f}%"),
    ]


if __name__ == "__main__":
    typer.run(main)
