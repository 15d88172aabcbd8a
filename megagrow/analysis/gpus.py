"""What a GPU has, by its datasheet: memory, power, and what it computes."""

from dataclasses import dataclass

from megagrow.errors import InputError
from megagrow.train.flops import PEAK_FLOPS

MEMORY_AND_WATTS = {
    "H100 PCIE": (80, 350),
    "H100 NVL": (94, 400),
    "H100": (80, 700),
    "H200 NVL": (141, 600),
    "H200": (141, 700),
    "H800 PCIE": (80, 350),
    "H800": (80, 700),
    "H20": (96, 400),
    "A100": (80, 400),
    "A800": (80, 400),
    "A40": (48, 300),
    "A30": (24, 165),
    "A10": (24, 150),
    "L40S": (48, 350),
    "L40": (48, 300),
    "L4": (24, 72),
    "B200": (180, 1000),
}
"""Name -> GB of memory, and watts that it may take at most (thermal design power); NVIDIA's
datasheets. A plain name is the SXM card; A100 and A800 are those of 80 GB. A superchip's watts are
for its CPU too: GH200 and GB200 have no row."""


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    peak_flops: float
    """Dense bf16 FLOP/s."""
    memory: int | None
    """Bytes, None where it is not known. GB are taken as 1000s: what is between them and the card's
    own count goes to the driver and to what the allocator cannot use."""
    watts: float | None


def find_gpu(name: str, option: str = "--gpu") -> Gpu:
    """A card by its name: `h100`, `H100-NVL`, `"a100"`. InputError, which names the option, for one
    that is not known."""
    known = dict(PEAK_FLOPS)
    key = " ".join(name.upper().replace("-", " ").split())
    if key not in known:
        names = ", ".join(row.lower().replace(" ", "-") for row in known)
        raise InputError(f"{option} {name}: not known; known are {names}")
    gigabytes, watts = MEMORY_AND_WATTS.get(key, (None, None))
    memory = None if gigabytes is None else gigabytes * 10**9
    return Gpu(key, known[key], memory, watts)
