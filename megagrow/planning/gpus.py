"""A card by the name that the command line gives it."""

from megagrow.common.gpu_specs import GPUS, Gpu
from megagrow.errors import InputError

__all__ = ["Gpu", "find_gpu"]


def find_gpu(name: str, option: str = "--gpu") -> Gpu:
    """A card by its name: `h100`, `H100-NVL`, `"a100"`. InputError, which names the option, for one
    that is not known."""
    known = {gpu.name: gpu for gpu in GPUS}
    key = " ".join(name.upper().replace("-", " ").split())
    if key not in known:
        names = ", ".join(row.lower().replace(" ", "-") for row in known)
        raise InputError(f"{option} {name}: not known; known are {names}")
    return known[key]
