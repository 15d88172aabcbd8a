"""Tests of the adapters of mamba-ssm and causal-conv1d, with stand-ins of the same signatures.

The stand-ins compute in the packages' layout (batch, channels, sequence) and check what the
packages require of their arguments.
"""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow_kernels import mamba_ssm_backend, reference
from tests.helpers.kernels.accuracy import draw


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    assert u.stride(-1) == delta.stride(-1) == B.stride(-1) == C.stride(-1) == 1
    assert A.dtype == D.dtype == delta_bias.dtype == torch.float32 and z is None
    delta = delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    state, outputs = torch.zeros_like(u[:, :, :1] * A), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = state * torch.exp(step * A) + step * B[:, None, :, t] * u[:, :, t, None]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    return torch.stack(outputs, -1) + D[:, None] * u


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    assert x.stride(1) == 1 and seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
    assert initial_states is None and not return_final_states and activation == "silu"
    rows = []
    for row, documents in zip(x, seq_idx, strict=True):
        parts = row.split(documents.unique_consecutive(return_counts=True)[1].tolist(), dim=1)
        convolved = [
            F.conv1d(F.pad(part, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(x[0]))
            for part in parts
        ]
        rows.append(F.silu(torch.cat(convolved, 1)))
    return torch.stack(rows)


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stand-ins."""
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    modules = {name: ModuleType(name) for name in (*names, "causal_conv1d")}
    modules[names[-1]].selective_scan_fn = selective_scan_fn
    modules["causal_conv1d"].causal_conv1d_fn = causal_conv1d_fn
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_selective_scan():
    shapes = ((2, 7, 5), (2, 7, 5), (5, 3), (2, 7, 3), (2, 7, 3), (5,), (5,))
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    inputs[2] = -inputs[2].exp()
    expected = reference.selective_scan(*inputs)
    torch.testing.assert_close(mamba_ssm_backend.selective_scan(*inputs), expected)


def test_causal_conv():
    x, weight, bias = draw(2, 9, 5), draw(5, 4, seed=1), draw(5, seed=2)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, [2, 3, 7]] = True
    expected = reference.causal_conv(x, weight, bias, starts)
    torch.testing.assert_close(mamba_ssm_backend.causal_conv(x, weight, bias, starts), expected)
