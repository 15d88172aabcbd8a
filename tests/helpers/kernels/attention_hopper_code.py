"""Run without the interpreter, and no GPU: the Hopper attention compiled for sm_90.

Takes cases as JSON (head dimension, type, window, stages), gives what the assembler made of each.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from triton import knobs
from triton.runtime.driver import driver

from megagrow_kernels import attention_hopper
from tests.helpers.kernels.attention_compilations import Target

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*)", re.MULTILINE)


def dumped(cubin: Path, what: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, what, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def overlapped(instructions: list[str]) -> list[int]:
    """How many exponentials stand between each wait that leaves one group of matmuls running and
    the wait for that one."""
    found, running = [], False
    for instruction in instructions:
        if instruction.startswith("WARPGROUP.DEPBAR"):
            running = instruction.split()[-1] == "0x1"
            found += [0] if running else []
        elif running and instruction.startswith("MUFU.EX2"):
            found[-1] += 1
    return found


def compiled(head_dim: int, dtype: torch.dtype, window: int | None, stages: int) -> dict:
    """The code of one case: 16 heads that share 4 key/value heads."""
    q, k = (torch.empty(2, 2048, n, head_dim, dtype=dtype, device="meta") for n in (16, 4))
    tiles = torch.empty(32, 3, dtype=torch.int32, device="meta")
    attention_hopper.attention_hopper_forward(q, k, k, tiles, 0.125, window, stages)
    *_, kernel = attention_hopper._kernel.device_caches[0][0].values()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        resources = dumped(cubin, "--dump-resource-usage")
        instructions = INSTRUCTION.findall(dumped(cubin, "--dump-sass"))
    return {
        "shared": kernel.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", resources)[1]),
        "stack": int(re.search(r"STACK:(\d+)", resources)[1]),
        "setmaxnreg": re.findall(r"setmaxnreg\.(\w+)\S*\s+(\d+)", kernel.asm["ptx"]),
        "instructions": Counter(re.split(r"[.\s]", text)[0] for text in instructions),
        "overlapped_exponentials": overlapped(instructions),
    }


if __name__ == "__main__":
    driver.set_active(Target())
    cases = [(n, getattr(torch, dtype), *rest) for n, dtype, *rest in json.loads(sys.argv[1])]
    print(json.dumps([compiled(*case) for case in cases]))
