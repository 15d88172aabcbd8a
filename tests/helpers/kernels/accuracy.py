"""How near a kernel has to come to the truth: the yardstick of all kernel tests.

Three results are compared: what the kernel found, the exact one (fp64), and its twin, the same
equations in plain torch in the kernel's own precision. A kernel may err by twice as much as its
twin, and a few units in the last place; no tolerance is guessed (the idea is flash-attention's).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

RELATIVE_RMSE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}
"""The largest error of a whole tensor, root mean square, as a share of the exact one's."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers, the same for every seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def units(exact: Tensor, dtype: torch.dtype, least: float = 0.0) -> float:
    """What rounding to dtype may cost: twice the largest loss of `exact` + 0.3 - 0.3, computed in
    dtype, and one unit in the last place of the largest number, or of `least` if that is larger.
    """
    rounded = exact.to(dtype)
    lost = ((rounded + 0.3) - 0.3).double() - rounded.double()
    largest = max(rounded.double().abs().max().item(), least)
    return 2 * lost.abs().max().item() + largest * torch.finfo(dtype).eps


def close(found: Tensor, exact: Tensor, twin: Tensor, name: str = "", least: float = 0.0) -> None:
    """Asserts that `found` is as good as its precision allows; NaN and infinity never are.

    exact is fp64; all have the same shape, and found and twin the same dtype. `least` is the size
    of the terms that cancel, where the exact result is (almost) zero.
    """
    assert found.shape == exact.shape == twin.shape, name
    assert found.dtype == twin.dtype and exact.dtype == torch.float64, name
    assert found.isfinite().all(), f"{name}: {int((~found.isfinite()).sum())} are not finite"
    error = found.double() - exact
    allowed = 2 * (twin.double() - exact).abs().max().item() + units(exact, found.dtype, least)
    worst = error.abs().max().item()
    assert worst <= allowed, f"{name}: off by {worst:.3g}, allowed {allowed:.3g}"
    if exact.abs().max() > least:
        share = (error.square().mean() / exact.square().mean()).sqrt().item()
        most = RELATIVE_RMSE[found.dtype]
        assert share <= most, f"{name}: relative RMSE {share:.3g}, allowed {most:.3g}"


def with_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Tensor]:
    """The outputs of function(*inputs) in dtype, then the gradient of every input.

    What flows back into the outputs is random, the same in every call, and rounded as inputs are.
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
    """Within, torch.empty and its kin give NaN (and the largest integers): what a kernel forgets
    to write, or reads before anyone wrote it, shows.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warning = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warning)


def check(
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    eager: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    least: float = 0.0,
) -> None:
    """Holds a kernel, outputs and all gradients, to `eager`, which computes in the dtype it is
    given: fp64 for the exact results, `dtype` for the twin. The inputs are first rounded to dtype.
    """
    rounded = [x.to(dtype) for x in inputs]
    with poisoned():
        found = with_gradients(kernel, rounded, dtype)
    exact = with_gradients(eager, rounded, torch.float64)
    twin = with_gradients(eager, rounded, dtype)
    for i, (one, truth, other) in enumerate(zip(found, exact, twin, strict=True)):
        place = i - (len(found) - len(inputs))
        name = f"output {i}" if place < 0 else f"gradient of input {place}"
        close(one, truth, other, name, least)
