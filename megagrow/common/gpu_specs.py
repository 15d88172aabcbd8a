"""What a GPU has, by its datasheet: what it computes, its memory, and its power.

docs/guides/planning.md says for each figure where it was read, and which of them no source could
be found
for. Links, and what else only a predicted step needs, stand in planning/cluster.py.
"""

from dataclasses import dataclass

from megagrow.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    """Words that are all in the name of its device, as `torch.cuda.get_device_name` gives it."""
    peak_flops: float
    """Dense bf16 FLOP/s: of what a datasheet gives with sparsity, one half."""
    memory: int | None
    """Bytes, None where it is not known. GB are taken as 1000s: what is between them and the card's
    own count goes to the driver and to what the allocator cannot use."""
    watts: float | None
    """At most (thermal design power), None where it is not known."""


def _card(name: str, tflops: float, gigabytes: int | None, watts: float | None) -> Gpu:
    memory = None if gigabytes is None else gigabytes * 10**9
    return Gpu(name, tflops * 1e12, memory, watts)


GPUS = (
    _card("H100 PCIE", 756, 80, 350),
    _card("H100 NVL", 835, 94, 400),
    _card("H100", 989, 80, 700),
    _card("H200 NVL", 835, 141, 600),
    _card("H200", 989, 141, 700),
    _card("GH200", 989, None, None),
    _card("H800 PCIE", 756, 80, 350),
    _card("H800", 989, 80, 700),
    _card("H20", 148, 96, 400),
    _card("A100", 312, 80, 400),
    _card("A800", 312, 80, 400),
    _card("A40", 149.7, 48, 300),
    _card("A30", 165, 24, 165),
    _card("A10", 125, 24, 150),
    _card("L40S", 362, 48, 350),
    _card("L40", 181, 48, 300),
    _card("L4", 121, 24, 72),
    _card("GB200", 2500, None, None),
    _card("B200", 2250, 180, 1000),
)
"""Cards of NVIDIA, TFLOP/s, GB and watts. A plain name is the SXM card; A100 and A800 are those of
80 GB. A superchip comes with several memories, and its watts are for its CPU too: GH200 and GB200
have neither here."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device, by its name in `torch.cuda.get_device_name`: of the first
    row of `GPUS` all of whose words are in it.

    None where it is not known, so also for a slice of a device (MIG).
    """
    words = set(device_name.upper().replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((gpu.peak_flops for gpu in GPUS if words.issuperset(gpu.name.split())), None)


__all__ = ["Gpu", "find_gpu"]


def find_gpu(name: str, option: str = "--gpu") -> Gpu:
    """A card by its name: `h100`, `H100-NVL`, `"a100"`. InputError, which names the option, for one
    that is not known."""
    known = {gpu.name: gpu for gpu in GPUS}
    key = " ".join(name.upper().replace("-", " ").split())
    if key not in known:
        names = ", ".join(row.lower().replace(" ", "-") for row in known)
        raise ConfigError(f"{option} {name}: not known; known are {names}")
    return known[key]
