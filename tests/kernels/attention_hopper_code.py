"""Run without the interpreter, and no GPU: compiles the Hopper attention for sm_90.

Writes as JSON, for each case, what the assembler made of it.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from megagrow_kernels import attention_hopper
from triton import knobs

from tests.kernels.attention_compilations import Target
from triton.runtime.driver import driver

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


def dumped(cubin: Path, what: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, what, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compiled(
    head_dim: int, dtype: torch.dtype, window: int | None, stages: int
) -> dict[str, object]:
    """The code of one case: 16 heads that share 4 key/value heads."""
    q, k = (torch.empty(2, 2048, n, head_dim, dtype=dtype, device="meta") for n in (16, 4))
    tiles = torch.empty(32, 3, dtype=torch.int32, device="meta")
    attention_hopper.attention_hopper_forward(q, k, k, tiles, 0.125, window, stages)
    *_, kernel = attention_hopper._kernel.device_caches[0][0].values()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        resources = dumped(cubin, "--dump-resource-usage")
        counts = Counter(INSTRUCTION.findall(dumped(cubin, "--dump-sass")))
    return {
        "shared": kernel.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", resources)[1]),
        "stack": int(re.search(r"STACK:(\d+)", resources)[1]),
        "setmaxnreg": re.findall(r"setmaxnreg\.(\w+)\S* (\d+)", kernel.asm["ptx"]),
        "instructions": counts,
    }


if __name__ == "__main__":
    driver.set_active(Target())
    print(
        json.dumps(
            [compiled(n, getattr(torch, dtype), *rest) for n, dtype, *rest in json.loads(sys.argv[1])]
        )
    )
