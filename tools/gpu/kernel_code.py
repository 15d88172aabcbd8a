"""Inspects the machine code of kernels, without a GPU.

    python tools/gpu/kernel_code.py [--architecture 90] [--op attention]

compiles every op for every row of its tables of tiles and prints what is wrong with the code; takes
minutes the first time, and seconds as long as Triton's cache has the kernels. Compilers may end
their process, so the work is done by processes that are started anew when they die.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run as a script, it finds only itself

from megagrow_kernels.calls import launches  # noqa: E402
from megagrow_kernels.compiling import Compiled, compile_for, watched  # noqa: E402
from megagrow_kernels.machine_code import (  # noqa: E402
    SHARED_LIMIT,
    TENSOR_CORES,
    read_machine_code,
)
from tools.gpu.kernel_cases import KERNELS, OPS, cases, replaced, untaken  # noqa: E402

ARCHITECTURES = (80, 90, 100)
PROCESSES = 2
WORKER = "--worker"


@dataclass(frozen=True)
class Job:
    """A call of an op (see `megagrow_kernels.calls`) to be compiled for an architecture."""

    architecture: int
    op: str
    arguments: Mapping[str, Any]
    specialised: bool = False
    """Whether tiles ask for warps of different work."""
    tiles: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By table, what takes the place of its rows; then the kernels of these tables are all that
    counts. Without it, all kernels of the op do."""

    def __str__(self) -> str:
        tiles = [f"{name}={value}" for use in self.tiles.values() for name, value in use.items()]
        shown = [f"{name}={value}" for name, value in self.arguments.items()]
        return "-".join((f"sm_{self.architecture}", self.op, *shown, *tiles))


@dataclass(frozen=True)
class Code:
    """One kernel of a job."""

    name: str
    hash: str
    registers: int
    stack: int
    local: int
    spills: int
    shared: int
    matrix_products: bool
    """Of 16-bit numbers, in the source."""
    tensor_cores: dict[str, int]
    """Instructions for them in the machine code, by name."""
    specialised: bool
    """Whether registers are moved between warps of different work."""

    def problems(self, architecture: int) -> list[str]:
        """What is wrong with it on an architecture."""
        found = []
        if self.spills or self.stack or self.local:
            found.append(
                f"{self.name} spills: {self.spills} instructions, {self.stack} bytes of stack, "
                f"{self.local} of local memory, {self.registers} registers"
            )
        most = SHARED_LIMIT[architecture]
        if self.shared > most:
            found.append(f"{self.name} takes {self.shared} bytes of shared memory of {most}")
        wanted = TENSOR_CORES[architecture]
        if self.matrix_products and not any(self.tensor_cores.get(name) for name in wanted):
            found.append(f"{self.name} multiplies matrices without {' or '.join(wanted)}")
        return found

    def __str__(self) -> str:
        cores = ", ".join(f"{count} {name}" for name, count in self.tensor_cores.items() if count)
        return (
            f"{self.name}: {self.registers} registers, {self.spills} spills, {self.shared} shared, "
            f"{cores or 'no tensor cores'}{', specialised' if self.specialised else ''}"
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    job: Job
    codes: tuple[Code, ...] = ()
    error: str | None = None
    seconds: float = 0.0

    def problems(self) -> list[str]:
        """All that is wrong with it, each in a line that names the kernel."""
        if self.error is not None:
            return [f"{self.job}: {self.error}"]
        tables = self.job.tiles
        named = {name for table in tables for name in KERNELS[table]}
        judged = [code for code in self.codes if code.name in named or not tables]
        found = [text for code in judged for text in code.problems(self.job.architecture)]
        if self.job.specialised and not any(code.specialised for code in self.codes):
            found.append("its tiles ask for specialised warps, and no kernel has any")
        return [f"{self.job}: {problem}" for problem in found]


def table_jobs(architectures: Iterable[int], ops: Iterable[str] | None = None) -> list[Job]:
    """Jobs that between them take every row of every table."""
    return [
        Job(architecture, case.op, case.arguments, case.specialised)
        for architecture in architectures
        for op in (OPS if ops is None else ops)
        for case in cases(op, architecture)
    ]


def inspect(jobs: Iterable[Job], processes: int = PROCESSES) -> Iterator[Outcome]:
    """Compiles all jobs and reads their code; gives what it finds in the order of the jobs."""
    workers: list[_Worker] = []
    mine = threading.local()

    def begin() -> None:
        mine.worker = _Worker()
        workers.append(mine.worker)

    try:
        with ThreadPoolExecutor(processes, initializer=begin) as threads:
            yield from threads.map(lambda job: mine.worker.do(job), jobs)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that compiles, one job at a time; started anew if a job ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def do(self, job: Job) -> Outcome:
        if self._process is None:
            self._process = _start()
        process, begin = self._process, time.perf_counter()
        assert process.stdin is not None and process.stdout is not None
        task = [job.architecture, job.op, dict(job.arguments), dict(job.tiles)]
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        seconds = time.perf_counter() - begin
        if not answer:
            process.communicate()
            self._process = None
            died = f"the compiler ended its process, exit code {process.returncode}"
            return Outcome(job, error=died, seconds=seconds)
        codes, error = json.loads(answer)
        return Outcome(job, tuple(Code(**code) for code in codes), error, seconds)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start() -> subprocess.Popen[str]:
    """A process that compiles kernels, whatever this one does with them."""
    return subprocess.Popen(
        ["env", "-u", "TRITON_INTERPRET", sys.executable, __file__, WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def work() -> None:
    """The life of a process that compiles: jobs come in by lines, and go out as lines."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever compilers print
    for line in sys.stdin:
        codes: list[Code] = []
        error = None
        try:
            codes = compiled(*json.loads(line))
        except Exception as raised:  # compilers raise anything; it is told with the job's name
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps([[asdict(code) for code in codes], error]), file=answers, flush=True)


def compiled(
    architecture: int, op: str, arguments: Mapping[str, Any], tiles: Mapping[str, dict[str, int]]
) -> list[Code]:
    """Compiles one call of an op in this process; the code of all its kernels."""
    compile_for(architecture)
    with watched() as kernels, replaced(architecture, tiles):
        for table, launch in launches(op, torch.device("meta"), arguments).items():
            if table in tiles or not tiles:
                launch()
    return [code_of(kernel) for kernel in kernels]


def code_of(kernel: Compiled) -> Code:
    """What the assembler made of a compiled kernel."""
    machine = read_machine_code(kernel.files["cubin"])
    names = sorted({name for names in TENSOR_CORES.values() for name in names})
    ptx = kernel.files["ptx"].read_text(encoding="utf-8")
    return Code(
        *(kernel.name, kernel.hash, machine.registers, machine.stack, machine.local),
        *(machine.spills, kernel.shared, _multiplies_16_bit(kernel.files)),
        {name: machine.instructions[name] for name in names},
        "setmaxnreg" in ptx,
    )


def _multiplies_16_bit(files: Mapping[str, Path]) -> bool:
    """Whether there is a product of matrices of 16-bit numbers in the first form of a kernel that
    Triton keeps."""
    source = next(files[kind] for kind in ("ttir", "ttgir") if kind in files)
    products = [x for x in source.read_text("utf-8").splitlines() if "dot" in x or "mma" in x]
    return any("xbf16" in line or "xf16" in line for line in products)


def main() -> None:
    """Compiles the whole table, or a part of it; the exit code is 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, action="append")
    parser.add_argument("--op", choices=OPS, action="append")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    given = parser.parse_args()
    architectures = given.architecture or ARCHITECTURES
    begin = time.perf_counter()
    outcomes = []
    for outcome in inspect(table_jobs(architectures, given.op), given.processes):
        print(*(f"{outcome.job} {code}" for code in outcome.codes), sep="\n", flush=True)
        outcomes.append(outcome)
    problems = [problem for outcome in outcomes for problem in outcome.problems()]
    problems += [
        f"tiles/{table}.json: on sm_{architecture} nothing takes {row}"
        for architecture in architectures
        for table, row in untaken(architecture)
    ]
    print(*problems, sep="\n")
    kernels = {code.hash for outcome in outcomes for code in outcome.codes}
    seconds = time.perf_counter() - begin
    print(
        f"{len(outcomes)} calls, {len(kernels)} kernels, {len(problems)} problems, {seconds:.0f} s"
    )
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    if sys.argv[1:] == [WORKER]:
        work()
    else:
        main()
