"""Masks: at 0 the grown model is its source, at 1 they are gone, in between they are the paper's.

Weights are random everywhere, and those that are new are large: nothing here is exact by luck.
"""

from dataclasses import astuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.model.decoder import CausalLM
from megagrow.model.masks import Masks, masks_at
from tests.helpers.model.grown_pairs import (
    HEADS,
    every_token,
    gentle_model,
    grown_model,
    grown_pair,
    model_config,
    random_model,
)
from tests.helpers.model.masked_reference import Coefficients, logits, vector


def masks_of(source: ModelConfig, target: ModelConfig, c: Coefficients) -> Masks:
    """Masks made by hand; a coefficient of 1 leaves its mask out."""

    def mask(name: str, c: float) -> Tensor | None:
        old, size = getattr(source, name), getattr(target, name)
        return None if c == 1 else vector(old, size, c)

    new_layers = target.num_hidden_layers - source.num_hidden_layers
    return Masks(
        (1.0,) * source.num_hidden_layers + (c.depth,) * new_layers,
        mask("hidden_size", c.residual),
        mask("num_key_value_heads", c.heads),
        mask("intermediate_size", c.ffn),
    )


sizes = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([1, 2, 3]),
        "each": st.sampled_from([1, 2, 4]),
        "hidden_size": st.integers(1, 12),
        "intermediate_size": st.integers(1, 12),
        "num_hidden_layers": st.integers(1, 2),
    }
)
more = st.tuples(*[st.integers(0, 5)] * 4)
"""Groups, hidden size, feed-forward, layers that come in addition."""


@settings(max_examples=40, deadline=None)
@given(sizes, more, st.booleans(), st.sampled_from([0.0, 1e-2, 1.0]))
def test_at_mask_0_the_logits_are_the_sources(old, added, tied, eps):
    common = {"tie_word_embeddings": tied, "rms_norm_eps": eps}
    source = model_config(**old, **common)
    names = ("groups", "hidden_size", "intermediate_size", "num_hidden_layers")
    new = {name: old[name] + extra for name, extra in zip(names, added, strict=True)}
    target = model_config(each=old["each"], **new, **common)
    small = random_model(source, seed=0)
    large = grown_model(small, target)
    ids, positions = every_token(source)
    masks = masks_at(source, target, tokens=0, ramp_tokens=10)
    assert (masks is None) == (source == target)
    expected, found = small(ids, positions), large(ids, positions, None, masks)
    assert (found - expected).abs().max() < 1e-10 * max(1.0, expected.abs().max().item())


def test_without_masks_the_logits_differ():
    """Else the test above would prove nothing."""
    source, target = grown_pair()
    small = random_model(source, seed=0)
    ids, positions = every_token(source)
    assert (grown_model(small, target)(ids, positions) - small(ids, positions)).abs().max() > 0.1


def test_new_layers_alone_change_no_bit_at_mask_0():
    source = model_config(2, 2)
    target = model_config(2, 2, num_hidden_layers=5)
    small = random_model(source, seed=0)
    ids, positions = every_token(source)
    masks = masks_at(source, target, tokens=0, ramp_tokens=10)
    assert torch.equal(
        grown_model(small, target)(ids, positions, None, masks), small(ids, positions)
    )


COEFFICIENTS = {
    "all the way": Coefficients(0.3, 0.7, 0.2, 0.6),
    "only begun": Coefficients(1e-3, 1e-3, 1e-3, 1e-3),
    "closed": Coefficients(0.0, 0.0, 0.0, 0.0),
    "depth": Coefficients(depth=0.5),
    "feed-forward": Coefficients(ffn=0.5),
    "residual": Coefficients(residual=0.5),
    "heads": Coefficients(heads=0.5),
    "open": Coefficients(),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("c", COEFFICIENTS.values(), ids=COEFFICIENTS.keys())
def test_logits_are_those_of_the_equations(c, heads, tied):
    source, target = grown_pair(heads, tied)
    model = grown_model(random_model(source, seed=0), target)
    ids, positions = every_token(target)
    found = model(ids, positions, None, masks_of(source, target, c))
    weights = model.state_dict()
    expected = logits(weights, source, target, c, ids)
    # The model's tables of the rotation are fp32.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    for index, value in enumerate(astuple(c)):
        if value < 1:
            other = Coefficients(
                *(value + 0.1 * (i == index) for i, value in enumerate(astuple(c)))
            )
            moved = (logits(weights, source, target, other, ids) - expected).abs().max()
            assert moved > 1e-3 * expected.abs().max(), "the test would prove nothing"


def test_where_all_masks_are_1_no_bit_differs_from_the_plain_model():
    source, target = grown_pair()
    model = grown_model(random_model(source, seed=0), target)
    ids, positions = every_token(target)
    plain = model(ids, positions)
    ones = Masks((1.0,) * 3, torch.ones(14), torch.ones(3), torch.ones(18))
    assert masks_at(source, target, tokens=10, ramp_tokens=10) is None
    for masks in (Masks(), ones):
        assert torch.equal(model(ids, positions, None, masks), plain)


def gradients(model: CausalLM, config: ModelConfig, masks: Masks | None) -> dict[str, Tensor]:
    ids, positions = every_token(config)
    scores = model(ids, positions, None, masks)
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), ids.roll(-1).flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_are_those_of_the_equations():
    source, target = grown_pair()
    c = COEFFICIENTS["all the way"]
    model = grown_model(random_model(source, seed=0), target)
    found = gradients(model, target, masks_of(source, target, c))
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    ids, _ = every_token(target)
    scores = logits(weights, source, target, c, ids)
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), ids.roll(-1).flatten()).backward()
    for name, gradient in found.items():
        right = weights[name].grad
        assert (gradient - right).abs().max() < 1e-4 * right.abs().max(), name


def is_new(name: str, axis: str, source: ModelConfig, target: ModelConfig, shape: Any) -> Tensor:
    """Which entries of a parameter are there only because one axis has grown."""
    sizes = {
        "residual": (source.hidden_size, target.hidden_size),
        "ffn": (source.intermediate_size, target.intermediate_size),
        "groups": tuple(m.num_key_value_heads * m.head_dim for m in (source, target)),
        "queries": tuple(m.num_attention_heads * m.head_dim for m in (source, target)),
    }
    axes = ["residual"]
    leaf = name.split(".")[-2]
    if leaf in ("embed_tokens", "lm_head"):
        axes = ["", "residual"]
    elif leaf in ("q_proj", "k_proj", "v_proj"):
        axes = ["queries" if leaf == "q_proj" else "groups", "residual"]
    elif leaf in ("gate_proj", "up_proj"):
        axes = ["ffn", "residual"]
    elif leaf in ("o_proj", "down_proj"):
        axes = ["residual", "queries" if leaf == "o_proj" else "ffn"]
    new = torch.zeros(shape, dtype=torch.bool)
    for dim, role in enumerate(axes):
        if role == axis or (role == "queries" and axis == "groups"):
            old, size = sizes[role]
            new.narrow(dim, old, size - old).fill_(True)
    return new


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("heads", HEADS)
def test_what_is_let_in_has_a_gradient_and_what_is_not_has_none(heads, tied):
    source, target = grown_pair(heads, tied)
    opened = {0: [], 1: ["ffn"], 4: ["ffn", "residual"], 8: ["ffn", "residual", "groups"]}
    for tokens, live in opened.items():
        model = gentle_model(source, target)
        found = gradients(model, target, masks_at(source, target, tokens, ramp_tokens=9))
        for name, gradient in found.items():
            closed = torch.zeros(gradient.shape, dtype=torch.bool)
            for axis in ("ffn", "residual", "groups"):
                if axis not in live:
                    closed |= is_new(name, axis, source, target, gradient.shape)
            if "layers.2" in name and tokens == 0:
                closed |= True
            assert (gradient[closed] == 0).all(), (tokens, name)
            assert (gradient[~closed] != 0).all(), (tokens, name)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(recompute):
    source, target = grown_pair()
    masks = masks_at(source, target, tokens=4, ramp_tokens=9)
    plain = grown_model(random_model(source, seed=0), target)
    again = CausalLM(target, recompute).double()
    again.load_state_dict(plain.state_dict())
    expected = gradients(plain, target, masks)
    for name, gradient in gradients(again, target, masks).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_types_are_as_close_as_they_can_be(dtype):
    source, target = grown_pair()
    masks = masks_at(source, target, tokens=4, ramp_tokens=9)
    model = gentle_model(source, target)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    ids, positions = every_token(target)
    exact, plain = model(ids, positions, None, masks), model(ids, positions)
    model.to(dtype)
    found = model(ids, positions, None, masks)
    assert found.dtype == dtype
    error = (found - exact).abs().mean() / exact.abs().mean()
    usual = (model(ids, positions) - plain).abs().mean() / plain.abs().mean()
    assert error < 2 * usual
