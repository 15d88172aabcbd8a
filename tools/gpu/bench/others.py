"""What others have made, where it is installed: none of it is needed, all of it is compared with.

flash-attn exists in three generations with modules of their own: 2 is built from source, 3
(flash_attn_interface) too, 4 (flash_attn.cute) is a wheel.
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
}
"""Name -> module."""


def there(library: str) -> bool:
    """Whether a library of LIBRARIES is installed."""
    try:
        return importlib.util.find_spec(LIBRARIES[library]) is not None
    except ModuleNotFoundError:  # of flash_attn, for flash_attn.cute
        return False


def missing() -> list[str]:
    """The libraries that cannot be compared with here."""
    return [library for library in LIBRARIES if not there(library)]


def liger(name: str) -> Callable[..., Any] | None:
    """A function of liger_kernel.transformers.functional; None without Liger, or in one that does
    not have it."""
    if not there("liger"):
        return None
    functional = importlib.import_module("liger_kernel.transformers.functional")
    return getattr(functional, name, None)


def flash_attention(name: str) -> dict[str, Callable[..., Any]]:
    """`flash_attn_func` or `flash_attn_varlen_func` of every generation that is here, each giving
    the output alone."""
    found = {}
    for library in ("flash-attn 2", "flash-attn 3", "flash-attn 4"):
        if there(library):
            function = getattr(importlib.import_module(LIBRARIES[library]), name, None)
            if function is not None:
                found[library] = _output_of(function)
    return found


def cut_cross_entropy() -> Callable[..., Any] | None:
    """linear_cross_entropy(hidden, weight, labels) of Apple's library, if it is here."""
    if not there("cut-cross-entropy"):
        return None
    return importlib.import_module(LIBRARIES["cut-cross-entropy"]).linear_cross_entropy


def _output_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Some generations also return the log-sum-exp."""

    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        return result[0] if isinstance(result, tuple) else result

    return call
