"""Optional third-party kernels that serve as baselines where they are installed.

flash-attn exists in three generations with separate modules: 2 and 3 (flash_attn_interface) are
built from source, 4 (flash_attn.cute) is a wheel.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

LIBRARIES = {
    "liger": "liger_kernel",
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
    "cut-cross-entropy": "cut_cross_entropy",
    "mamba-ssm": "mamba_ssm",
    "causal-conv1d": "causal_conv1d",
}
"""Modules by library name."""


def is_installed(library: str) -> bool:
    """Return True if a library of LIBRARIES is installed."""
    try:
        return importlib.util.find_spec(LIBRARIES[library]) is not None
    except ModuleNotFoundError:  # flash_attn is missing
        return False


def missing_libraries() -> list[str]:
    """Return the libraries that are not installed."""
    return [library for library in LIBRARIES if not is_installed(library)]


def liger(name: str) -> Callable[..., Any] | None:
    """Return a function of liger_kernel.transformers.functional; None if it is not available."""
    if not is_installed("liger"):
        return None
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return getattr(functional, name, None)


def flash_attention(name: str) -> dict[str, Callable[..., Any]]:
    """Return the function from every installed generation, each returning only the output.

    `name` is `flash_attn_func` or `flash_attn_varlen_func`.
    """
    functions = {}
    for library in ("flash-attn 2", "flash-attn 3", "flash-attn 4"):
        if is_installed(library):
            function = getattr(importlib.import_module(LIBRARIES[library]), name, None)
            if function is not None:
                functions[library] = _output_of(function)
    return functions


def cut_cross_entropy() -> Callable[..., Any] | None:
    """Return linear_cross_entropy(hidden, weight, labels) of Apple's library, if installed."""
    if not is_installed("cut-cross-entropy"):
        return None
    return importlib.import_module(LIBRARIES["cut-cross-entropy"]).linear_cross_entropy


def _output_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Drop the log-sum-exp that some generations also return."""

    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        return result[0] if isinstance(result, tuple) else result

    return call
