"""Source lines that cause an event: the innermost frame of megagrow and of DeepSpeed."""

import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

_HERE = str(Path(__file__).parent)
_PACKAGES = ("megagrow", "megagrow_kernels", "deepspeed")
_ALLOCATORS = ("zeros", "zeros_like")
"""Functions of megagrow/parallel/materialize.py that allocate for their callers."""


class Site(NamedTuple):
    """Source line, and the line of megagrow from which it was reached."""

    file: str
    """Path that begins with the package, such as `megagrow/train/step.py`."""
    line: int
    function: str
    caller: str = ""
    """`FILE:LINE` in megagrow if the line itself is in DeepSpeed."""

    def __str__(self) -> str:
        end = f" < {self.caller}" if self.caller else ""
        return f"{self.file}:{self.line} ({self.function}){end}"


NOWHERE = Site("", 0, "")
"""Site of an event outside of the packages."""

_NAMES: dict[CodeType, str | None] = {}


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
            if not name.startswith("deepspeed"):
                return inner if inner.file == name else inner._replace(caller=f"{name}:{line}")
        frame = frame.f_back
    return inner or NOWHERE


def _name_of(code: CodeType) -> str | None:
    """Return the path of a code object's file from its package on; None outside of the packages."""
    if code not in _NAMES:
        path = Path(code.co_filename)
        start = next((i for i, part in enumerate(path.parts) if part in _PACKAGES), None)
        helper = path.name == "materialize.py" and code.co_name in _ALLOCATORS
        inside = start is not None and not helper and not code.co_filename.startswith(_HERE)
        _NAMES[code] = "/".join(path.parts[start:]) if inside else None
    return _NAMES[code]
