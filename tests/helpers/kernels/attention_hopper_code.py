"""Compile the Hopper attention for sm_90 and print its machine code statistics.

Runs without the interpreter and without a GPU. Reads cases as JSON (head dimension, dtype, window,
stages) and writes the statistics of each.
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
from tests.helpers.kernels.attention_compilations import CompileOnlyDriver

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*)", re.MULTILINE)


def dump(cubin: Path, option: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def overlapped(instructions: list[str]) -> list[int]:
    """Return the number of exponentials during each matmul group in flight.

    Counts from the wait that leaves one group running to the wait for that group.
    """
    actual, running = [], False
    for instruction in instructions:
        if instruction.startswith("WARPGROUP.DEPBAR"):
            running = instruction.split()[-1] == "0x1"
            actual += [0] if running else []
        elif running and instruction.startswith("MUFU.EX2"):
            actual[-1] += 1
    return actual


def compiled(head_dim: int, dtype: torch.dtype, window: int | None, stages: int) -> dict:
    """Return the code statistics of one case: 16 heads that share 4 key/value heads."""
    q, k = (torch.empty(2, 2048, n, head_dim, dtype=dtype, device="meta") for n in (16, 4))
    tiles = torch.empty(32, 3, dtype=torch.int32, device="meta")
    attention_hopper.attention_hopper_forward(q, k, k, tiles, 0.125, window, stages)
    *_, kernel = attention_hopper._kernel.device_caches[0][0].values()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        resources = dump(cubin, "--dump-resource-usage")
        instructions = INSTRUCTION.findall(dump(cubin, "--dump-sass"))
    return {
        "shared": kernel.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", resources)[1]),
        "stack": int(re.search(r"STACK:(\d+)", resources)[1]),
        "setmaxnreg": re.findall(r"setmaxnreg\.(\w+)\S*\s+(\d+)", kernel.asm["ptx"]),
        "instructions": Counter(re.split(r"[.\s]", text)[0] for text in instructions),
        "overlapped_exponentials": overlapped(instructions),
    }


if __name__ == "__main__":
    driver.set_active(CompileOnlyDriver())
    cases = [(n, getattr(torch, dtype), *rest) for n, dtype, *rest in json.loads(sys.argv[1])]
    print(json.dumps([compiled(*case) for case in cases]))
