"""Scans and convolutions with written-out gradients against autograd of the references."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from megagrow.model import blocked_scan
from megagrow.model import selective_scan as module
from megagrow.model.selective_scan import causal_conv, selective_scan, selective_scan_from
from megagrow_kernels import reference

SIZES = [(2, 37, 5, 4), (5, 16, 3, 2), (1, 1, 4, 3), (2, 3, 1, 1)]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-7}
"""Largest error, in relation to the largest value."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide the inputs below into several groups of rows and blocks of 8 tokens."""
    monkeypatch.setattr(module, "STEP_ELEMENTS", 40)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 40)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scan_inputs(batch: int, length: int, channels: int, size: int) -> list[Tensor]:
    """Inputs of a scan in fp64, in the order of its arguments."""
    x, dt = (draw(batch, length, channels, seed=seed) for seed in (0, 1))
    B, C = (draw(batch, length, size, seed=seed) for seed in (2, 3))
    D, dt_bias = (draw(channels, seed=seed) for seed in (4, 5))
    return [x, 2 * dt, -draw(channels, size, seed=6).exp(), B, C, D, dt_bias]


def conv_inputs(batch: int, length: int, channels: int, width: int) -> list[Tensor]:
    shapes = ((batch, length, channels), (channels, width), (channels,))
    return [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def documents(batch: int, length: int) -> Tensor:
    """Starts of documents, of which one has a single token."""
    starts = draw(batch, length, seed=7) > 1
    starts[:, -2:] = True
    return starts


def outcome(call: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output and input gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, draw(*y.shape, seed=8).to(y.dtype))]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("call", "expected", "inputs"),
    [
        (selective_scan, reference.selective_scan, scan_inputs),
        (causal_conv, reference.causal_conv, conv_inputs),
    ],
)
def test_parity_with_the_reference(
    call: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    inputs: Callable[..., list[Tensor]],
    size: tuple[int, ...],
    packed: bool,
    dtype: torch.dtype,
) -> None:
    starts = documents(*size[:2]) if packed else None
    tensors = [x.to(dtype) for x in inputs(*size)]
    found, wanted = (outcome(partial(each, starts=starts), *tensors) for each in (call, expected))
    assert_same(found, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("call", [selective_scan, causal_conv])
def test_gradients_against_finite_differences(call: Callable[..., Tensor]) -> None:
    make = scan_inputs if call is selective_scan else conv_inputs
    leaves = [x.requires_grad_() for x in make(2, 9, 2, 3)]
    assert torch.autograd.gradcheck(partial(call, starts=documents(2, 9)), leaves)


@pytest.mark.parametrize("packed", [False, True])
def test_step_sizes_from_1e_8_to_100(packed: bool) -> None:
    starts = documents(2, 37) if packed else None
    inputs = scan_inputs(2, 37, 5, 4)
    inputs[1] = torch.linspace(-18, 100, inputs[1].numel()).flip(0).view_as(inputs[1]).double()
    inputs[2][0, 0] = 0
    wanted = outcome(partial(reference.selective_scan, starts=starts), *inputs)
    found = outcome(partial(selective_scan, starts=starts), *inputs)
    assert_same(found, wanted, TOLERANCES[torch.float64])
    single = outcome(partial(selective_scan, starts=starts), *(x.float() for x in inputs))
    assert_same(single, [x.float() for x in wanted], TOLERANCES[torch.float32])


def test_autocast_and_activation_checkpointing_change_no_bit() -> None:
    inputs = [x.float() for x in scan_inputs(2, 37, 5, 4)]
    expected = outcome(selective_scan, *inputs)
    checkpointed = outcome(partial(checkpoint, selective_scan, use_reentrant=False), *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = outcome(selective_scan, *inputs)
    for found in (checkpointed, cast):
        assert all(map(torch.equal, found, expected))


def test_chunks_of_devices_without_cache_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, starts = scan_inputs(2, 36, 5, 4), documents(2, 36)
    expected = outcome(partial(reference.selective_scan, starts=starts), *inputs)
    monkeypatch.setattr(blocked_scan, "_chunk_length", lambda values: 4)
    assert_same(outcome(partial(selective_scan, starts=starts), *inputs), expected, 1e-10)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_are_known_without_data(device: str) -> None:
    context = FakeTensorMode() if device == "cpu" else torch.device(device)
    with context:
        inputs = [torch.empty(x.shape) for x in scan_inputs(2, 36, 5, 4)]
        starts = torch.empty(2, 36, dtype=torch.bool)
        leaves = [x.requires_grad_() for x in inputs]
        y = selective_scan(*leaves, starts)
        grads = torch.autograd.grad(y, leaves, torch.empty(y.shape))
    assert y.shape == (2, 36, 5)
    assert [x.shape for x in grads] == [x.shape for x in inputs]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_scan_in_pieces_is_the_scan_at_once(dtype: torch.dtype) -> None:
    x, dt, A, B, C, *rest = (x.to(dtype) for x in scan_inputs(3, 37, 5, 4))
    state, pieces = A.new_zeros(3, 5, 4), []
    for part in (slice(0, 20), slice(20, 21), slice(21, 37)):
        inputs = (each[:, part] for each in (x, dt))
        y, state = selective_scan_from(state, *inputs, A, B[:, part], C[:, part], *rest)
        pieces.append(y)
    at_once = selective_scan_from(torch.zeros_like(state), x, dt, A, B, C, *rest)
    expected = [selective_scan(x, dt, A, B, C, *rest), at_once[1]]
    assert_same([torch.cat(pieces, 1), state], expected, TOLERANCES[dtype])


def test_padding_leaves_the_state_unchanged() -> None:
    x, dt, A, B, C, *rest = (x.float() for x in scan_inputs(3, 37, 5, 4))
    dt[0], dt[1, 20:] = -torch.inf, -torch.inf
    state = draw(3, 5, 4, seed=9).float()
    y, found = selective_scan_from(state, x, dt, A, B, C, *rest)
    assert torch.equal(found[0], state[0])
    assert y.isfinite().all()
    real = (each[1:2, :20] for each in (x, dt, B, C))
    x, dt, B, C = real
    expected = selective_scan_from(state[1:2], x, dt, A, B, C, *rest)
    assert_same([y[1:2, :20], found[1:2]], list(expected), TOLERANCES[torch.float32])


def test_mixer_of_transformers() -> None:
    config = MambaConfig(hidden_size=6, state_size=4, time_step_rank=3, num_hidden_layers=1)
    torch.manual_seed(0)
    mixer = MambaMixer(config, 0)
    hidden = draw(2, 37, 6, seed=0).float()

    def composed(hidden: Tensor) -> Tensor:
        x, gate = mixer.in_proj(hidden).chunk(2, dim=-1)
        x = causal_conv(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias)
        dt, B, C = mixer.x_proj(x).split((3, 4, 4), dim=-1)
        dt, A = dt @ mixer.dt_proj.weight.T, -mixer.A_log.exp()
        y = selective_scan(x, dt, A, B, C, mixer.D, mixer.dt_proj.bias)
        return mixer.out_proj(y * torch.nn.functional.silu(gate))

    results = []
    for y in (composed(hidden), mixer(hidden)):
        grads = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
        results.append([y.detach(), *grads])
    assert_same(*results, TOLERANCES[torch.float32])
