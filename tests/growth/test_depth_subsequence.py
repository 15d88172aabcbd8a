"""Depthwise growth, bit for bit: without its new layers the grown model is the source."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.growth import OperatorName
from megagrow.growth.operators import OPERATORS
from tests.helpers.growth.cases import Case, case, cases, sources
from tools.docs.operators.reference_training import (
    Tensors,
    grown_weights,
    logits,
    random_ids,
    random_weights,
)

DEEP = tuple(name for name, operator in OPERATORS.items() if operator.deeper)

few = settings(max_examples=20, deadline=None)


def kept(found: Case) -> list[int]:
    """Target layers that speak, and that are the source's layers in their order."""
    layers: list[int] = []
    for layer, origin in enumerate(found.growth.provenance):
        is_reporter = found.growth.weights[f"model.layers.{layer}.self_attn.o_proj.weight"]
        if origin == len(layers) and is_reporter:
            layers.append(layer)
    return layers


def of_layers(weights: Tensors, layers: list[int]) -> Tensors:
    """The weights of a model that has only these layers, in this order."""
    out = {name: w for name, w in weights.items() if ".layers." not in name}
    for position, layer in enumerate(layers):
        old, new = f"model.layers.{layer}.", f"model.layers.{position}."
        out |= {n.replace(old, new): w for n, w in weights.items() if n.startswith(old)}
    return out


def assert_source_without(found: Case, layers: list[int]) -> None:
    """Run only those layers of the target."""
    weights, ids = random_weights(found.source), random_ids(found.source)
    part = of_layers(grown_weights(found, weights), layers)
    old, new = (logits(found.source, w, ids) for w in (weights, part))
    assert torch.equal(old, new)


@pytest.mark.parametrize("name", [name for name in DEEP if name != "direct_depth"])
@few
@given(st.data())
def test_without_the_new_layers_stands_the_source(name: OperatorName, data: st.DataObject) -> None:
    found = data.draw(cases(name))
    layers = kept(found)
    assert len(layers) == found.source.num_hidden_layers
    assert_source_without(found, layers)


@few
@given(sources(), st.data())
def test_a_list_that_holds_all_layers_in_order_holds_the_source(source, data) -> None:
    any_layer = st.lists(st.integers(0, source.num_hidden_layers - 1), max_size=2)
    chosen = data.draw(any_layer)
    for layer in range(source.num_hidden_layers):
        chosen += [layer, *data.draw(any_layer)]
    sizes = {"num_hidden_layers": len(chosen)}
    found = case(source, sizes, operator="direct_depth", layer_map=chosen)
    assert_source_without(found, kept(found))


@pytest.mark.parametrize("layers", ["stack", "interpolate"])
@few
@given(sources(), st.integers(2, 4))
def test_stacks_and_interpolations_hold_the_source(layers: str, source, factor: int) -> None:
    sizes = {"num_hidden_layers": factor * source.num_hidden_layers}
    found = case(source, sizes, operator="direct_depth", layer_map=layers)
    assert_source_without(found, kept(found))


@few
@given(cases("direct_depth"))
def test_any_list_runs_the_layers_of_the_source_in_its_order(found: Case) -> None:
    weights, ids = random_weights(found.source), random_ids(found.source)
    listed = of_layers(weights, list(found.growth.provenance))
    old = logits(found.target, listed, ids)
    assert torch.equal(old, logits(found.target, grown_weights(found, weights), ids))
