"""Makes Triton's interpreter look for what it replaces once, not at every call of a function.

Before each call, of a helper too, it goes through all members of `triton.language` to find the
builtins that it puts its own in the place of. Which names these are does not change.
"""

import functools
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _builtins(package: Any) -> tuple[str, ...]:
    return tuple(name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member))


def _patch_builtin(package: Any, *how: Any) -> None:
    for name in _builtins(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):  # it is not if it has been replaced already
            interpreter._patch_attr(package, name, member, *how)


def remember_builtins() -> None:
    """For this process and those it forks; nothing may have been interpreted before."""
    for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        assert _builtins(package), package
    interpreter._patch_builtin = _patch_builtin
