"""Source lines that cause an event: the innermost frame of megagrow, its kernels and DeepSpeed."""

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

_HERE = Path(__file__).parent
_PACKAGES = ("megagrow", "megagrow_kernels", "deepspeed")
_FOR_CALLERS = {
    "megagrow/parallel/materialize.py": ("zeros", "zeros_like"),
    "megagrow/parallel/engine_build.py": ("flat_zeros",),
    "deepspeed/utils/nvtx.py": ("wrapped_fn",),
    "deepspeed/runtime/zero/linear.py": ("forward", "backward", "zero3_linear_wrap"),
}
"""Functions that allocate for their callers, by file."""


class Site(NamedTuple):
    """Source line, and the line of megagrow from which it was reached."""

    file: str
    """Path that begins with the package, such as `megagrow/train/step.py`."""
    line: int
    function: str
    caller: str = ""
    """`FILE:LINE` in megagrow if the line itself is in DeepSpeed or in a kernel."""

    def __str__(self) -> str:
        end = f" < {self.caller}" if self.caller else ""
        return f"{self.file}:{self.line} ({self.function}){end}"


NOWHERE = Site("", 0, "")
"""Site of an event outside of the packages."""


def current_site() -> Site:
    """Return the site of the running code, without frames of torch and of this package."""
    frame: FrameType | None = sys._getframe(1)
    inner: Site | None = None
    while frame is not None:
        name = _name_of(frame.f_code)
        if name is not None:
            line = frame.f_lineno
            if inner is None:
                inner = Site(name, line, frame.f_code.co_qualname)
            if name.startswith("megagrow/"):
                return inner if inner.file == name else inner._replace(caller=f"{name}:{line}")
        frame = frame.f_back
    return inner or NOWHERE


@cache
def _name_of(code: CodeType) -> str | None:
    """Return the path of a code object's file from its package on; None outside of the packages."""
    path = Path(code.co_filename)
    if path.is_relative_to(_HERE):
        return None
    for root in _roots():
        if path.is_relative_to(root):
            name = path.relative_to(root.parent).as_posix()
            return None if code.co_name in _FOR_CALLERS.get(name, ()) else name
    return None


@cache
def _roots() -> tuple[Path, ...]:
    """Return the folders of the packages."""
    specs = [find_spec(name) for name in _PACKAGES]
    return tuple(Path(spec.origin).parent for spec in specs if spec and spec.origin)
