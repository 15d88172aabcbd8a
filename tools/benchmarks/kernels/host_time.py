"""Host time of kernel calls: registered ops, eager autograd functions, and launches alone.

    PYTHONPATH=.:kernels python tools/benchmarks/kernels/host_time.py [--calls 300]

Launches do nothing (`simulated_gpu.py`), so the time of a call is that of Python, PyTorch and
Triton on this host; no GPU is needed. Each time is the least of several repetitions in turns, so
that all columns see the same load. Prints microseconds per call and the ratio of the registered op,
which torch.compile and dispatch modes use, to the eager call.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megagrow_kernels import attention, dispatch  # noqa: E402
from megagrow_kernels.attention_forward import attention_forward  # noqa: E402
from megagrow_kernels.packing import pack  # noqa: E402
from megagrow_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_forward  # noqa: E402
from megagrow_kernels.rope import rope, rope_forward  # noqa: E402
from megagrow_kernels.swiglu import swiglu, swiglu_forward  # noqa: E402
from tools.benchmarks.kernels.simulated_gpu import Driver, simulated_gpu  # noqa: E402

MULTIPROCESSORS = 132
REPETITIONS = 7
EPS, SCALE = 1e-5, 0.125

Call = Callable[[], object]


def main() -> None:
    """Measure all ops and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=300, help="calls per repetition")
    options = parser.parse_args()
    torch.set_num_threads(1)
    driver.set_active(Driver())
    with tempfile.TemporaryDirectory() as folder, simulated_gpu(MULTIPROCESSORS):
        knobs.cache.dir = folder
        print(
            f"{'op':14s} {'pass':9s} {'launch':>8s} {'eager':>8s} {'op':>8s} {'op/eager':>9s}  us"
        )
        for op, (function, launch, inputs) in operations().items():
            for name, calls in passes(function, launch, inputs).items():
                seconds = least_seconds(calls, options.calls)
                cells = [
                    f"{1e6 * seconds[key]:8.1f}" if key in seconds else " " * 8 for key in KEYS
                ]
                ratio = seconds["registered"] / seconds["eager"]
                print(f"{op:14s} {name:9s} {' '.join(cells)} {ratio:9.2f}", flush=True)


KEYS = ("launch", "eager", "registered")


def operations() -> dict[str, tuple[Callable[..., object], Call, Sequence[Tensor]]]:
    """Return each op, its forward launch without autograd, and its differentiable inputs."""
    x, residual, weight = draw(8, 64), draw(8, 64), draw(64)
    q, k, v = draw(1, 16, 4, 64), draw(1, 16, 2, 64), draw(1, 16, 2, 64)
    cos, sin = draw(1, 16, 1, 64).detach(), draw(1, 16, 1, 64).detach()
    packing = pack(None, 1, 16)
    plain = {name: y.detach() for name, y in {"x": x, "r": residual, "w": weight}.items()}
    heads = [y.detach() for y in (q, k, v)]
    return {
        "rms_norm": (
            lambda: rms_norm(x, weight, EPS),
            lambda: rms_norm_forward(plain["x"], None, plain["w"], EPS),
            [x, weight],
        ),
        "add_rms_norm": (
            lambda: add_rms_norm(x, residual, weight, EPS),
            lambda: rms_norm_forward(plain["x"], plain["r"], plain["w"], EPS),
            [x, residual, weight],
        ),
        "rope": (
            lambda: rope(q, k, cos, sin),
            lambda: rope_forward(heads[0], heads[1], cos, sin),
            [q, k],
        ),
        "swiglu": (
            lambda: swiglu(x, residual),
            lambda: swiglu_forward(plain["x"], plain["r"]),
            [x, residual],
        ),
        "attention": (
            lambda: attention.attention(q, k, v, packing),
            lambda: attention_forward(*heads, packing.query_tiles, SCALE, None),
            [q, k, v],
        ),
    }


def draw(*shape: int) -> Tensor:
    """Return a bf16 tensor that requires a gradient."""
    return torch.randn(shape, dtype=torch.float32).to(torch.bfloat16).requires_grad_()


def passes(
    function: Callable[[], object], launch: Call, inputs: Sequence[Tensor]
) -> dict[str, dict[str, Call]]:
    """Return the calls to compare, by pass."""
    forward = {"launch": launch, "eager": function, "registered": as_op(function)}
    return {
        "forward": forward,
        "backward": {key: backward(forward[key], inputs) for key in ("eager", "registered")},
    }


def as_op(function: Call) -> Call:
    """Return the call with its registered op, as under torch.compile."""

    def call() -> object:
        with every_call_traced():
            return function()

    return call


@contextlib.contextmanager
def every_call_traced() -> Iterator[None]:
    """Let `dispatch.is_traced` return True within the context."""
    original, dispatch.is_traced = dispatch.is_traced, lambda x: True
    try:
        yield
    finally:
        dispatch.is_traced = original


def backward(function: Call, inputs: Sequence[Tensor]) -> Call:
    """Return a function that computes the gradients of one forward pass again and again."""
    found = function()
    outputs = found if isinstance(found, tuple) else (found,)
    upstream = [torch.ones_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)


def least_seconds(calls: Mapping[str, Call], count: int) -> dict[str, float]:
    """Return the least seconds per call over repetitions in turns, in process time."""
    for call in calls.values():
        call()
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(REPETITIONS):
        for key, call in calls.items():
            begin = time.process_time()
            for _ in range(count):
                call()
            least[key] = min(least[key], (time.process_time() - begin) / count)
    return least


if __name__ == "__main__":
    main()
