"""Linear layers of one input: they are plain layers, and their products add up its gradient."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megagrow.model.layers.linears import apply_linears
from megagrow.model.layers.modules import Attention, Context, DocumentBounds
from megagrow.model.masks import Masks
from megagrow.model.ops import PLAIN
from tests.helpers.hugging_face import tiny

WIDTHS = (6, 3, 3)
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}
"""By dtype: largest difference in units of the largest value; bf16 sums are rounded once less."""


class Layers(nn.Module):
    """Layers of one input, and one layer of all their outputs."""

    def __init__(self, dtype: torch.dtype = torch.float64, apply: Callable = apply_linears) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(4, width, bias=False) for width in WIDTHS)
        self.last = nn.Linear(sum(WIDTHS), 2, bias=False)
        self.apply_all = apply
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        (out,) = self.apply_all(torch.cat(self.apply_all(x, *self.parts), -1).sin(), self.last)
        return out


def plain(x: Tensor, *modules: nn.Linear) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, module.weight) for module in modules)


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 4, generator=generator).to(dtype).requires_grad_()


def outcome(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    out = model(x)
    out.square().sum().backward()
    found = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return out.detach(), found


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    error = (actual.double() - expected.double()).abs().max()
    return actual.dtype == expected.dtype and error <= tolerance * expected.double().abs().max()


@pytest.mark.parametrize("autocast", [False, True], ids=["as is", "autocast"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_are_those_of_plain_layers(dtype: torch.dtype, autocast: bool) -> None:
    if autocast and dtype == torch.float64:
        pytest.skip("torch casts no fp64")
    found = []
    for apply in (apply_linears, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(outcome(Layers(dtype, apply), batch(dtype)))
    (out, actual), (expected_out, expected) = found
    assert torch.equal(out, expected_out)
    tolerance = TOLERANCE[torch.bfloat16 if autocast else dtype]
    for each, other in zip(actual, expected, strict=True):
        assert close(each, other, tolerance)


def test_first_and_second_derivatives_are_right() -> None:
    model, x = Layers(), batch()
    weights = [each.weight for each in model.parts]

    def outputs(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        modules = [functional_linear(weight) for weight in weights]
        return apply_linears(x, *modules)

    assert torch.autograd.gradcheck(outputs, (x, *weights))
    assert torch.autograd.gradgradcheck(outputs, (x, *weights))


def functional_linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(1, 1, bias=False)
    del module.weight
    module.weight = weight
    return module


def test_only_required_gradients_are_computed() -> None:
    model, x = Layers(), batch().detach()
    model.parts[1].weight.requires_grad_(False)
    _, (dx, *others) = outcome(model, x)
    assert dx is None and [each is None for each in others] == [False, True, False, False]

    x = batch()
    outputs = apply_linears(x, *model.parts)
    outputs[2].sum().backward()  # the others contribute nothing
    assert torch.equal(x.grad, model.parts[2].weight.sum(0).expand_as(x))


class Calls(TorchDispatchMode):
    """Count operations, and add up the sizes of their results, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True], ids=["as is", "autocast"])
def test_products_add_up_the_gradient_of_the_input(autocast: bool) -> None:
    """Three layers: 3 products of weights' gradients and one buffer for that of the input."""
    model, x = Layers(torch.float32), batch(torch.float32)
    with Calls() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = apply_linears(x, *model.parts)
    with Calls() as calls:
        torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
    assert (calls.counts["mm"], calls.counts["addmm_"]) == (4, 2)
    assert calls.counts["add"] == calls.counts["add_"] == 0
    # One copy of the input and one of each weight.
    assert forward.counts["_to_copy"] == calls.counts["_to_copy"] == (4 if autocast else 0)


def test_attention_adds_no_gradients_of_its_input() -> None:
    config = tiny(num_key_value_heads=2)
    block, x = Attention(config), torch.randn(1, 5, config.hidden_size, requires_grad=True)
    tables = (torch.ones(1, 5, 1, config.head_dim), torch.zeros(1, 5, 1, config.head_dim))
    out = block(
        x,
        Context(PLAIN, *tables, DocumentBounds(lambda window: None, lambda: None), Masks(), "none"),
    )
    with Calls() as calls:
        out.sum().backward()
    assert calls.counts["addmm_"] == 2 and calls.counts["mm"] == 4 + 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_change_no_bit(reentrant: bool) -> None:
    expected_out, expected = outcome(Layers(), batch())
    model = Layers()
    out, actual = outcome(lambda_module(model, reentrant), batch())
    assert torch.equal(out, expected_out)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def lambda_module(model: nn.Module, reentrant: bool) -> nn.Module:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=reentrant)

    return Checkpointed()


@pytest.mark.parametrize("hooks", [False, True])
def test_parameters_are_read_again_in_the_backward_pass(hooks: bool) -> None:
    """ZeRO 3 releases their memory after the forward pass, and gathers them elsewhere."""
    model, x = Layers(), batch()
    expected_out, expected = outcome(Layers(), batch())
    identity = (lambda t: t, lambda t: t)
    with saved_tensors_hooks(*identity) if hooks else nullcontext():
        out = model(x)
    kept = [StorageWeakRef(each.untyped_storage()) for each in model.parameters()]
    copies = [each.detach().clone() for each in model.parameters()]
    for each in model.parameters():
        each.data = torch.empty(0, dtype=each.dtype)
    assert all(storage.expired() for storage in kept)
    for each, copy in zip(model.parameters(), copies, strict=True):
        each.data = copy
    out.square().sum().backward()
    actual = [x.grad, *(each.grad for each in model.parameters())]
    assert torch.equal(out, expected_out)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_transformations_and_tensors_without_data() -> None:
    model, x = Layers(), batch().detach()
    weights = {name: each.detach() for name, each in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, weights, x).square().sum()

    per_sample = vmap(grad(loss), (None, 0))(weights, x)
    outcome(model, x)
    for name, parameter in model.named_parameters():
        assert torch.allclose(per_sample[name].sum(0), parameter.grad, rtol=0, atol=1e-12)

    with torch.device("meta"):
        meta = Layers(torch.bfloat16)
        out, gradients = outcome(meta, torch.empty(2, 3, 4, dtype=torch.bfloat16))
    assert out.shape == (2, 3, 2)
    assert [g.shape for g in gradients[1:]] == [p.shape for p in meta.parameters()]
