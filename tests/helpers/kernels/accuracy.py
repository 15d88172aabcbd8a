"""Checks of kernel outputs and gradients, by the criterion of `megagrow_kernels.accuracy`.

Three results are compared: the kernel's, the exact one (fp64), and its twin, the same equations in
plain PyTorch in the kernel's precision.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megagrow_kernels.accuracy import (
    RELATIVE_RMSE,
    TOLERANCE,
    poisoned,
    relative_rmse,
    segment_error,
)

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Terms = Callable[..., tuple[Tensor, ...]]
"""(inputs in fp64, output gradients) -> sizes of the terms of each input gradient."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normally distributed random numbers, deterministic for a seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def close(
    actual: Tensor, exact: Tensor, twin: Tensor, name: str = "", terms: Tensor | None = None
) -> None:
    """Assert that `actual` is as accurate as its precision allows; NaN and infinity always fail.

    exact is fp64; all have the same shape, and actual and twin the same dtype. `terms` is the size
    of the terms that cancel, see `segment_error`.
    """
    assert actual.shape == exact.shape == twin.shape, name
    assert actual.dtype == twin.dtype and exact.dtype == torch.float64, name
    assert actual.isfinite().all(), f"{name}: {int((~actual.isfinite()).sum())} are not finite"
    worst, limit = segment_error(actual, exact, terms, twin), TOLERANCE[actual.dtype]
    assert worst <= limit, f"{name}: a segment is off by {worst:.3g}, allowed {limit:.3g}"
    share, limit = relative_rmse(actual, exact, terms), RELATIVE_RMSE[actual.dtype]
    assert share <= limit, f"{name}: relative RMSE {share:.3g}, allowed {limit:.3g}"


def with_gradients(
    function: Function, inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Return the outputs of function(*inputs) in dtype, then the gradient of every input.

    The output gradients are random, the same in every call, and rounded like the inputs.
    """
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = upstream_of(outputs, inputs[0].dtype)
    gradients = torch.autograd.grad(
        outputs, leaves, [x.to(y.dtype) for x, y in zip(upstream, outputs, strict=True)]
    )
    return [*(y.detach() for y in outputs), *gradients]


def upstream_of(outputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the output gradients of `with_gradients`, in the dtype of the inputs."""
    return [draw(*y.shape, seed=100 + i, dtype=dtype).to(y.device) for i, y in enumerate(outputs)]


def check(
    kernel: Function,
    eager: Function,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    terms: Terms | None = None,
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
    outputs = exact[: len(exact) - len(inputs)]
    sizes: list[Tensor | None] = [None] * len(exact)
    if terms is not None:
        upstream = [x.double() for x in upstream_of(outputs, dtype)]
        sizes[len(outputs) :] = terms(*(x.double() for x in rounded), *upstream)
    for i, (one, truth, other) in enumerate(zip(actual, exact, twin, strict=True)):
        place = i - len(outputs)
        name = f"output {i}" if place < 0 else f"gradient of input {place}"
        close(one, truth, other, name, sizes[i])
