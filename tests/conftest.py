"""Every test process computes on the CPU with one thread: repeatable, and safe to fork.

Tests marked `gpu` start processes of their own, to which they give the GPUs back.
"""

import logging
import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

_HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
_HIDDEN |= {"TRITON_INTERPRET": "1"}
_BEFORE = dict(os.environ)
os.environ.update(_HIDDEN)
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line

if find_spec("triton") is not None:
    from tests.helpers.interpreter import remember_builtins

    remember_builtins()

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def gpu_environment() -> dict[str, str]:
    """The environment as it was before the GPUs were hidden; skips where there is none."""
    import torch

    if torch.version.cuda is None or not os.path.exists("/dev/nvidiactl"):
        pytest.skip("needs a GPU and a CUDA build of torch")
    return {name: value for name, value in os.environ.items() if name not in _HIDDEN} | {
        name: _BEFORE[name] for name in _HIDDEN if name in _BEFORE
    }


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Leave the `megagrow` logger as other tests expect it."""
    root = logging.getLogger("megagrow")
    before = root.handlers, root.level, root.propagate
    yield
    root.handlers, root.level, root.propagate = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: several workers then end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
