"""What the assembler made of a kernel: registers, spills and instructions, read from its cubin.

No GPU is needed: the disassembler comes with Triton.
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

TENSOR_CORES = {
    80: ("HMMA",),
    90: ("HGMMA",),
    100: ("UTCHMMA", "HMMA"),
}
"""Instructions that multiply matrices of 16-bit numbers, by compute capability: one of them."""

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
"""Bytes of shared memory that one program may have, by compute capability (CUDA C++ Programming
Guide, table of technical specifications)."""

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """One kernel's code."""

    registers: int
    """For each thread, at the launch."""
    stack: int
    """Bytes for each thread; spilled registers are part of it."""
    local: int
    instructions: Counter[str]
    """How often an instruction stands there, by its name without modifiers."""

    @property
    def spills(self) -> int:
        """Instructions that read or write what did not fit in registers."""
        return self.instructions["LDL"] + self.instructions["STL"]


def read_machine_code(cubin: Path) -> MachineCode:
    """Disassembles a cubin that holds one kernel."""
    found = _RESOURCES.findall(_dump(cubin, "--dump-resource-usage"))
    if len(found) != 1:
        raise ValueError(f"{cubin}: {len(found)} kernels where one is expected")
    instructions = Counter(_INSTRUCTION.findall(_dump(cubin, "--dump-sass")))
    return MachineCode(*map(int, found[0]), instructions)


def _dump(cubin: Path, what: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, what, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
