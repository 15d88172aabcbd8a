"""Compile kernels without a GPU, and inspect the machine code.

A launch with meta tensors only compiles, for the active target (see `launching.py`). This module
activates a target without a driver, records the compiled kernels, and reads registers, spills and
instructions from their cubins with the disassembler that ships with Triton.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

WARP = 32

TENSOR_CORES = {
    80: ("HMMA",),
    90: ("HGMMA",),
    100: ("UTCHMMA", "HMMA"),
}
"""16-bit matrix-multiply instructions by compute capability; code needs one of them."""

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
"""Shared memory limit of one program in bytes, by compute capability (CUDA C++ Programming Guide,
table of technical specifications).
"""

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


@dataclass(frozen=True)
class CompiledKernel:
    """Triton's result for one launch."""

    name: str
    hash: str
    """Folder name in Triton's cache: a hash of source, constants, options and target."""
    shared: int
    """Shared memory of one program in bytes."""
    options: Mapping[str, Any]
    """Triton's metadata, including num_warps and num_stages."""
    files: Mapping[str, Path]
    """Files by kind: ttir, ttgir, llir, ptx, cubin."""
    cached: bool
    """True if the kernel was already in Triton's cache."""


class _CompileOnlyDriver:
    """The subset of a driver that Triton needs to compile.

    Triton caches compiled kernels per device. Each instance is its own device, so Triton looks
    every kernel up in the disk cache at least once.
    """

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, WARP)

    def get_current_device(self) -> "_CompileOnlyDriver":
        return self

    def get_current_stream(self, device: "_CompileOnlyDriver") -> int:
        return 0


def compile_for(architecture: int) -> None:
    """Make this process compile for a compute capability (90 is an H100), with or without a GPU.

    The process can no longer launch kernels. Call it before the GPU is used. Call it again to make
    `record_compilations` report kernels that were already compiled.
    """
    driver.set_active(_CompileOnlyDriver(architecture))


@contextmanager
def record_compilations() -> Iterator[list[CompiledKernel]]:
    """Yield a list of the kernels compiled, or loaded from the disk cache, in the context."""
    kernels: list[CompiledKernel] = []

    def listen(
        *, metadata: Mapping[str, Any], metadata_group: Mapping[str, str], cache_hit: bool, **_: Any
    ) -> None:
        paths = [Path(path) for path in metadata_group.values()]
        files = {path.suffix[1:]: path for path in paths}
        name, key, shared = metadata["name"], metadata["hash"], metadata["shared"]
        kernels.append(CompiledKernel(name, key, shared, metadata, files, cache_hit))

    previous = knobs.compilation.listener
    knobs.compilation.listener = listen
    try:
        yield kernels
    finally:
        knobs.compilation.listener = previous


@dataclass(frozen=True)
class MachineCode:
    """Registers, memory and instructions of one kernel."""

    registers: int
    """Registers per thread at launch."""
    stack: int
    """Stack in bytes per thread, including spilled registers."""
    local: int
    instructions: Counter[str]
    """Number of occurrences of each instruction, by name without modifiers."""

    @property
    def spills(self) -> int:
        """Number of instructions that load or store spilled registers."""
        return self.instructions["LDL"] + self.instructions["STL"]


def read_machine_code(cubin: Path) -> MachineCode:
    """Disassemble a cubin.

    Raises ValueError unless the cubin holds exactly one kernel.
    """
    resources = _RESOURCES.findall(_dump(cubin, "--dump-resource-usage"))
    if len(resources) != 1:
        raise ValueError(f"{cubin}: found {len(resources)} kernels, expected 1")
    instructions = Counter(_INSTRUCTION.findall(_dump(cubin, "--dump-sass")))
    return MachineCode(*map(int, resources[0]), instructions)


def _dump(cubin: Path, option: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
