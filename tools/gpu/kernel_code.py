"""Inspect the machine code of kernels, without a GPU.

    python tools/gpu/kernel_code.py [--architecture 90] [--op attention]

Compiles every op for every row of its tile tables and prints the problems of the code. This takes
minutes the first time, and seconds while Triton's cache holds the kernels. A compiler may abort its
process, so compilation runs in worker processes that are restarted when they die.
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
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # for runs as a script

from megagrow_kernels.calls import launches  # noqa: E402
from megagrow_kernels.compiling import (  # noqa: E402
    SHARED_LIMIT,
    TENSOR_CORES,
    CompiledKernel,
    compile_for,
    read_machine_code,
    record_compilations,
)
from tools.gpu.kernel_cases import KERNELS, OPS, cases, override_tiles, unused_rows  # noqa: E402

ARCHITECTURES = (80, 90, 100)
PROCESSES = 2
WORKER = "--worker"


@dataclass(frozen=True)
class CompileJob:
    """A call of an op (see `megagrow_kernels.calls`) to compile for an architecture."""

    architecture: int
    op: str
    arguments: Mapping[str, Any]
    specialized: bool = False
    """True if the tiles select warp specialization."""
    tiles: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Replacement tiles by table. If set, only the kernels of these tables are judged, otherwise
    all kernels of the op.
    """

    def __str__(self) -> str:
        tiles = [f"{name}={value}" for use in self.tiles.values() for name, value in use.items()]
        arguments = [f"{name}={value}" for name, value in self.arguments.items()]
        return "-".join((f"sm_{self.architecture}", self.op, *arguments, *tiles))


@dataclass(frozen=True)
class KernelCode:
    """Machine code statistics of one kernel of a job."""

    name: str
    hash: str
    registers: int
    stack: int
    local: int
    spills: int
    shared: int
    matrix_products: bool
    """True if the source multiplies matrices of 16-bit numbers."""
    tensor_cores: dict[str, int]
    """Number of tensor core instructions, by name."""
    specialized: bool
    """True if registers are reallocated between specialized warps."""

    def problems(self, architecture: int) -> list[str]:
        """Return the problems of the code on an architecture."""
        problems = []
        if self.spills or self.stack or self.local:
            problems.append(
                f"{self.name} spills: {self.spills} instructions, {self.stack} bytes of stack, "
                f"{self.local} of local memory, {self.registers} registers"
            )
        limit = SHARED_LIMIT[architecture]
        if self.shared > limit:
            problems.append(f"{self.name} uses {self.shared} bytes of shared memory, limit {limit}")
        instructions = TENSOR_CORES[architecture]
        if self.matrix_products and not any(self.tensor_cores.get(name) for name in instructions):
            problems.append(f"{self.name} multiplies matrices without {' or '.join(instructions)}")
        return problems

    def __str__(self) -> str:
        cores = ", ".join(f"{count} {name}" for name, count in self.tensor_cores.items() if count)
        return (
            f"{self.name}: {self.registers} registers, {self.spills} spills, {self.shared} shared, "
            f"{cores or 'no tensor cores'}{', specialized' if self.specialized else ''}"
        )


@dataclass(frozen=True)
class CompileResult:
    """Compiled kernels or compiler error of a job."""

    job: CompileJob
    codes: tuple[KernelCode, ...] = ()
    error: str | None = None
    seconds: float = 0.0

    def problems(self) -> list[str]:
        """Return all problems of the job, one line each, with the kernel's name."""
        if self.error is not None:
            return [f"{self.job}: {self.error}"]
        tables = self.job.tiles
        kernels = {name for table in tables for name in KERNELS[table]}
        judged = [code for code in self.codes if code.name in kernels or not tables]
        problems = [text for code in judged for text in code.problems(self.job.architecture)]
        if self.job.specialized and not any(code.specialized for code in self.codes):
            problems.append("its tiles select specialized warps, but no kernel has any")
        return [f"{self.job}: {problem}" for problem in problems]


def table_jobs(architectures: Iterable[int], ops: Iterable[str] | None = None) -> list[CompileJob]:
    """Return jobs that together use every row of every table."""
    return [
        CompileJob(architecture, case.op, case.arguments, case.specialized)
        for architecture in architectures
        for op in (OPS if ops is None else ops)
        for case in cases(op, architecture)
    ]


def inspect(
    jobs: Iterable[CompileJob], processes: int = PROCESSES, triton: Path | None = None
) -> Iterator[CompileResult]:
    """Compile all jobs and inspect their code; yield the results in the order of the jobs.

    `triton` is a folder with another version of Triton than the installed one.
    """
    workers: list[_Worker] = []
    local = threading.local()

    def begin() -> None:
        local.worker = _Worker(triton)
        workers.append(local.worker)

    try:
        with ThreadPoolExecutor(processes, initializer=begin) as threads:
            yield from threads.map(lambda job: local.worker.do(job), jobs)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that compiles one job at a time; restarted if a job kills it."""

    def __init__(self, triton: Path | None = None) -> None:
        self._triton = triton
        self._process: subprocess.Popen[str] | None = None

    def do(self, job: CompileJob) -> CompileResult:
        if self._process is None:
            self._process = _start(self._triton)
        process, begin = self._process, time.perf_counter()
        assert process.stdin is not None and process.stdout is not None
        task = [job.architecture, job.op, dict(job.arguments), dict(job.tiles)]
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        reply = process.stdout.readline()
        seconds = time.perf_counter() - begin
        if not reply:
            process.communicate()
            self._process = None
            message = f"the compiler aborted its process, exit code {process.returncode}"
            return CompileResult(job, error=message, seconds=seconds)
        codes, error = json.loads(reply)
        return CompileResult(job, tuple(KernelCode(**code) for code in codes), error, seconds)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _start(triton: Path | None) -> subprocess.Popen[str]:
    """Start a worker process, which does not use Triton's interpreter."""
    environment = ["env", "-u", "TRITON_INTERPRET"]
    if triton is not None:
        environment.append(f"PYTHONPATH={triton}")
    return subprocess.Popen(
        [*environment, sys.executable, __file__, WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def run_worker() -> None:
    """Run a worker process: read jobs from stdin, one per line, and write one result line each."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # redirect compiler output
    for line in sys.stdin:
        codes: list[KernelCode] = []
        error = None
        try:
            codes = compile_call(*json.loads(line))
        except Exception as raised:  # compiler errors have no common class
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps([[asdict(code) for code in codes], error]), file=results, flush=True)


def compile_call(
    architecture: int, op: str, arguments: Mapping[str, Any], tiles: Mapping[str, dict[str, int]]
) -> list[KernelCode]:
    """Compile one call of an op in this process; return the code of all its kernels."""
    compile_for(architecture)
    with record_compilations() as kernels, override_tiles(architecture, tiles):
        for table, launch in launches(op, torch.device("meta"), arguments).items():
            if table in tiles or not tiles:
                launch()
    return [inspect_kernel(kernel) for kernel in kernels]


def inspect_kernel(kernel: CompiledKernel) -> KernelCode:
    """Return the machine code statistics of a compiled kernel."""
    machine = read_machine_code(kernel.files["cubin"])
    names = sorted({name for names in TENSOR_CORES.values() for name in names})
    ptx = kernel.files["ptx"].read_text(encoding="utf-8")
    return KernelCode(
        *(kernel.name, kernel.hash, machine.registers, machine.stack, machine.local),
        *(machine.spills, kernel.shared, _multiplies_16_bit(kernel.files)),
        {name: machine.instructions[name] for name in names},
        "setmaxnreg" in ptx,
    )


def _multiplies_16_bit(files: Mapping[str, Path]) -> bool:
    """Return True if a kernel's earliest intermediate form multiplies 16-bit matrices."""
    source = next(files[kind] for kind in ("ttir", "ttgir") if kind in files)
    products = [x for x in source.read_text("utf-8").splitlines() if "dot" in x or "mma" in x]
    return any("xbf16" in line or "xf16" in line for line in products)


def main() -> None:
    """Compile and inspect all tables, or those selected; exit with 1 if there are problems."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, action="append")
    parser.add_argument("--op", choices=OPS, action="append", help="default: all ops")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    options = parser.parse_args()
    architectures = options.architecture or ARCHITECTURES
    begin = time.perf_counter()
    outcomes = []
    for outcome in inspect(table_jobs(architectures, options.op), options.processes):
        print(*(f"{outcome.job} {code}" for code in outcome.codes), sep="\n", flush=True)
        outcomes.append(outcome)
    problems = [problem for outcome in outcomes for problem in outcome.problems()]
    problems += [
        f"tiles/{table}.json: sm_{architecture} never uses row {row}"
        for architecture in architectures
        for table, row in unused_rows(architecture)
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
        run_worker()
    else:
        main()
