"""GPU data sheets: compute throughput, memory and power.

docs/guides/planning.md lists the source of each figure and the figures without a source. Link
bandwidths and other inputs of the step-time model are in planning/cluster.py.
"""

from dataclasses import dataclass

from megagrow.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """Data sheet of one GPU."""

    name: str
    """Words that the device name of `torch.cuda.get_device_name` must all contain."""
    peak_flops: float
    """Dense bf16 FLOP/s: half of a data-sheet figure with sparsity."""
    memory: int | None
    """Bytes, None if unknown. A GB counts as 10^9 bytes: the rest of the card's capacity is
    reserved for the driver and for memory that the allocator cannot use."""
    watts: float | None
    """Thermal design power, None if unknown."""


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
"""NVIDIA GPUs: dense bf16 TFLOP/s, GB, watts.

A name without a form factor is the SXM card; A100 and A800 are the 80 GB versions. GH200 and GB200
have no memory size, because several versions exist, and no power, because it includes the CPU."""


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device, None if it is not known (`known_gpu`)."""
    gpu = known_gpu(device_name)
    return None if gpu is None else gpu.peak_flops


def known_gpu(device_name: str) -> Gpu | None:
    """Return the data sheet of a device, None if unknown or a slice of a device (MIG).

    `device_name` is the result of `torch.cuda.get_device_name`. It matches the first row of `GPUS`
    whose words it all contains.
    """
    words = set(device_name.upper().replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((gpu for gpu in GPUS if words.issuperset(gpu.name.split())), None)


def find_gpu(name: str, option: str = "--gpu") -> Gpu:
    """Return a GPU by its name: `h100`, `H100-NVL`.

    Raises:
        ConfigError: unknown name; the message includes `option` and the known names.
    """
    known = {gpu.name: gpu for gpu in GPUS}
    key = " ".join(name.upper().replace("-", " ").split())
    if key not in known:
        names = ", ".join(row.lower().replace(" ", "-") for row in known)
        raise ConfigError(f"{option} {name}: not known; use one of {names}")
    return known[key]
