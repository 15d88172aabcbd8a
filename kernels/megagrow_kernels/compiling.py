"""Kernels compiled for a GPU that need not be there.

What is launched with meta tensors is compiled for the active target and no more (see
`launching.py`). Here a target is made active without a driver, and what the compiler gives is seen.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

WARP = 32


@dataclass(frozen=True)
class Compiled:
    """What Triton made of one launch."""

    name: str
    hash: str
    """The name of its folder in Triton's cache: of the source, all constants, options, target."""
    shared: int
    """Bytes of shared memory that a program of it takes."""
    options: Mapping[str, Any]
    """All of Triton's notes, num_warps and num_stages among them."""
    files: Mapping[str, Path]
    """By kind: ttir, ttgir, llir, ptx, cubin."""
    cached: bool
    """Whether it had been in Triton's cache."""


class _Target:
    """All of a driver that Triton needs to compile. Compiled kernels are kept by device: to be a
    device of its own makes Triton look into its cache on disk at least once for each of them."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, WARP)

    def get_current_device(self) -> "_Target":
        return self

    def get_current_stream(self, device: "_Target") -> int:
        return 0


def compile_for(architecture: int) -> None:
    """From now on this process compiles for a compute capability (90 is an H100), GPU or none.

    It can launch nothing any more. Call it before a GPU is used, and again to see kernels once
    more that were compiled before.
    """
    driver.set_active(_Target(architecture))


@contextmanager
def watched() -> Iterator[list[Compiled]]:
    """A list to which every kernel is added that is compiled, or found in Triton's cache on disk,
    as long as the context lasts."""
    seen: list[Compiled] = []

    def listen(
        *, metadata: Mapping[str, Any], metadata_group: Mapping[str, str], cache_hit: bool, **_: Any
    ) -> None:
        paths = [Path(path) for path in metadata_group.values()]
        files = {path.suffix[1:]: path for path in paths}
        name, key, shared = metadata["name"], metadata["hash"], metadata["shared"]
        seen.append(Compiled(name, key, shared, metadata, files, cache_hit))

    before = knobs.compilation.listener
    knobs.compilation.listener = listen
    try:
        yield seen
    finally:
        knobs.compilation.listener = before
