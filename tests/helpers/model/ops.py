"""Operations of chosen backends, and their outputs and gradients for drawn inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

from megagrow.model.backends import Backends, KernelWorkload
from megagrow.model.machine import Machine, machine_of
from megagrow.model.ops import Ops, make_ops

CPU = machine_of(torch.device("cpu"))
TORCH = {"attention": "sdpa", "norm": "torch", "pointwise": "torch", "loss": "torch"}
TRITON = dict.fromkeys(TORCH, "triton")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 6, [7] * 12])
"""Two rows of 12 tokens, cut into documents of different lengths (one of a single token)."""


def ops_by(work: KernelWorkload | None = None, machine: Machine = CPU, **named: str) -> Ops:
    return make_ops(
        Backends(**TORCH | named), machine, work or KernelWorkload(torch.float32, 16, True)
    )


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outcome(call: Callable[..., Tensor | tuple], *inputs: Tensor) -> list[Tensor]:
    """Return the output of an op, and its input gradients for drawn output gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = call(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    weights = [draw(*x.shape, seed=9 + i) for i, x in enumerate(found)]
    total = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
    return [*(x.detach() for x in found), *torch.autograd.grad(total, leaves)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
