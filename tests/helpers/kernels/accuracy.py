"""Accuracy criterion of all kernel tests.

Three results are compared: the kernel's, the exact one (fp64), and its twin, the same equations in
plain PyTorch in the kernel's precision. A kernel's error may be twice that of its twin plus a few
units in the last place, so no tolerance is guessed (the method is flash-attention's).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

RELATIVE_RMSE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}
"""Largest root mean square error of a tensor relative to that of the exact result, by dtype."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normally distributed random numbers, deterministic for a seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def units(exact: Tensor, dtype: torch.dtype, least: float = 0.0) -> float:
    """Return the error allowed for rounding to dtype.

    It is twice the largest loss of `exact` + 0.3 - 0.3, computed in dtype, plus one unit in the
    last place of the largest element, or of `least` if that is larger.
    """
    rounded = exact.to(dtype)
    rounding_loss = ((rounded + 0.3) - 0.3).double() - rounded.double()
    largest = max(rounded.double().abs().max().item(), least)
    return 2 * rounding_loss.abs().max().item() + largest * torch.finfo(dtype).eps


def close(actual: Tensor, exact: Tensor, twin: Tensor, name: str = "", least: float = 0.0) -> None:
    """Assert that `actual` is as accurate as its precision allows; NaN and infinity always fail.

    exact is fp64; all have the same shape, and actual and twin the same dtype. `least` is the size
    of the terms that cancel if the exact result is (almost) zero.
    """
    assert actual.shape == exact.shape == twin.shape, name
    assert actual.dtype == twin.dtype and exact.dtype == torch.float64, name
    assert actual.isfinite().all(), f"{name}: {int((~actual.isfinite()).sum())} are not finite"
    error = actual.double() - exact
    allowed = 2 * (twin.double() - exact).abs().max().item() + units(exact, actual.dtype, least)
    worst = error.abs().max().item()
    assert worst <= allowed, f"{name}: off by {worst:.3g}, allowed {allowed:.3g}"
    if exact.abs().max() > least:
        share = (error.square().mean() / exact.square().mean()).sqrt().item()
        limit = RELATIVE_RMSE[actual.dtype]
        assert share <= limit, f"{name}: relative RMSE {share:.3g}, allowed {limit:.3g}"


def with_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the outputs of function(*inputs) in dtype, then the gradient of every input.

    The output gradients are random, the same in every call, and rounded like the inputs.
    """
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [
        draw(*y.shape, seed=100 + i, dtype=inputs[0].dtype).to(y.dtype)
        for i, y in enumerate(outputs)
    ]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    return [*(y.detach() for y in outputs), *gradients]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill the results of torch.empty with NaN (or the largest integer) within the context.

    Elements that a kernel does not write, or reads before they are written, become visible.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only_flag = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only_flag)


def check(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    eager: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    least: float = 0.0,
) -> None:
    """Check a kernel's outputs and gradients against `eager`, run in fp64 and in `dtype`.

    `eager` computes in the dtype of its inputs: fp64 for the exact results, `dtype` for the twin.
    The inputs are first rounded to dtype.
    """
    rounded = [x.to(dtype) for x in inputs]
    with poisoned():
        actual = with_gradients(kernel, rounded, dtype)
    exact = with_gradients(eager, rounded, torch.float64)
    twin = with_gradients(eager, rounded, dtype)
    for i, (one, truth, other) in enumerate(zip(actual, exact, twin, strict=True)):
        place = i - (len(actual) - len(inputs))
        name = f"output {i}" if place < 0 else f"gradient of input {place}"
        close(one, truth, other, name, least)
