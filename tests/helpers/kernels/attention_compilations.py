"""Count the compilations of the attention kernels over 100 packings and three windows.

Runs without the interpreter and without a GPU. Meta tensors are compiled for the driver's target
and never launched. Prints the number of compilations of each of the four kernels as JSON.
"""

import json
import random
from itertools import cycle, pairwise

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from megagrow_kernels import attention_backward, attention_forward
from megagrow_kernels.packing import Packing, pack

SEQUENCE = 1000
KERNELS = {
    "forward": attention_forward._forward_kernel,
    "delta": attention_backward._delta_kernel,
    "queries": attention_backward._queries_kernel,
    "keys": attention_backward._keys_kernel,
}


class CompileOnlyDriver:
    """The subset of a driver that Triton needs to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def packings(count: int) -> list[Packing]:
    """Return random packings of one to three rows."""
    source, actual = random.Random(0), []
    for _ in range(count):
        rows = []
        for _ in range(source.randint(1, 3)):
            cuts = sorted(source.sample(range(1, SEQUENCE), source.randint(0, 40)))
            lengths = [b - a for a, b in pairwise([0, *cuts, SEQUENCE])]
            rows.append(torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))
        actual.append(pack(torch.stack(rows), len(rows), SEQUENCE))
    return actual


def main() -> None:
    """Compile for all packings and print the counts."""
    driver.set_active(CompileOnlyDriver())
    windows = cycle((None, 1, 16, 500))
    for packing, window in zip((pack(None, 1, 16), *packings(100)), windows, strict=False):
        tokens = int(packing.cu_seqlens[-1])
        rows = max(1, tokens // SEQUENCE)
        shapes = [(rows, tokens // rows, heads, 16) for heads in (2, 1, 1)]
        q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
        tiles = packing.to("meta")
        saved = attention_forward.attention_forward(q, k, v, tiles.query_tiles, 0.25, window)
        attention_backward.attention_backward(
            q, q, k, v, *saved, tiles.query_tiles, tiles.key_tiles, 0.25, window
        )
    counts = {name: len(kernel.device_caches[0][0]) for name, kernel in KERNELS.items()}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
