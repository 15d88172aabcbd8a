"""Composition of growths, the inputs of their random numbers, and their counters."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.growth import OperatorName
from megagrow.config.schema import ModelConfig, OptimizerConfig
from megagrow.growth.map import Axis, Dense, Fill, Gather, GrowthMap, Term
from megagrow.growth.operators import OPERATORS, growth_map
from megagrow.parallel.engine_config import parameter_groups
from megagrow.parallel.optimizers.rules import ParamScale
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.fill import initial_values, normal
from tests.helpers.growth.cases import CHANGES, Case, case, cases, sources, times
from tests.helpers.growth.computing import random_moments
from tools.docs.operators.dense_growth import State, filled, grown

few = settings(max_examples=12, deadline=None)


def state_after(*growths: Case) -> State:
    """A random state of the first source, grown by one after the other."""
    state = random_moments(growths[0].source)
    for found in growths:
        state = grown(state, found.growth, found.target)
    return state


def assert_same_bits(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, kinds in one.items():
        for kind, tensor in kinds.items():
            assert torch.equal(tensor, other[name][kind]), (name, kind)


factors = st.tuples(*[st.sampled_from((1, 2, 4))] * 3)


@few
@given(sources(), factors, factors, st.sampled_from(("interleaved", "tiled")))
def test_two_copies_are_one_of_both_factors(source: Any, a: Any, b: Any, order: str) -> None:
    first = case(source, times(source, *a), operator="mup_copy", copy_order=order)
    second = case(first.target, times(first.target, *b), operator="mup_copy", copy_order=order)
    product = times(source, *(x * y for x, y in zip(a, b, strict=True)))
    both = case(source, product, operator="mup_copy", copy_order=order)
    assert_same_bits(state_after(first, second), state_after(both))
    for name, scale in both.growth.scales.items():
        assert first.growth.scales[name].times(second.growth.scales[name]) == scale


@few
@given(sources(), st.integers(1, 3), st.integers(1, 3))
def test_two_stacks_are_one_of_both_factors(source: Any, a: int, b: int) -> None:
    layers = source.num_hidden_layers
    first = case(source, {"num_hidden_layers": layers * a}, operator="direct_depth")
    second = case(first.target, {"num_hidden_layers": layers * a * b}, operator="direct_depth")
    both = case(source, {"num_hidden_layers": layers * a * b}, operator="direct_depth")
    assert_same_bits(state_after(first, second), state_after(both))


@few
@given(sources(), factors, st.sampled_from(("direct_depth", "zero_depth")), st.integers(1, 3))
def test_depth_and_width_commute(source: Any, by: Any, deeper: OperatorName, factor: int) -> None:
    width, depth = times(source, *by), {"num_hidden_layers": factor * source.num_hidden_layers}
    kept = {"optimizer_state": "transport"}
    deep = case(source, depth, operator=deeper, **kept)
    deep_then_wide = case(deep.target, width, operator="direct_width", **kept)
    wide = case(source, width, operator="direct_width", **kept)
    wide_then_deep = case(wide.target, depth, operator=deeper, **kept)
    both = case(source, width | depth, operator=[deeper, "direct_width"], **kept)
    expected = state_after(both)
    assert_same_bits(state_after(deep, deep_then_wide), expected)
    assert_same_bits(state_after(wide, wide_then_deep), expected)


NOT_AT_ONCE = ("staged_width", "llama_pro", "mslt", "midas", "lidas")
"""These always grow something."""


@pytest.mark.parametrize("name", [n for n in OPERATORS if n not in (*NOT_AT_ONCE, "isometric")])
@few
@given(sources(layers=2))
def test_a_growth_to_the_same_size_does_nothing(name: OperatorName, source: Any) -> None:
    found = case(source, {}, operator=name, optimizer_state="transport").growth
    assert (found.preserves_function or name in CHANGES) and not found.fills
    assert found.provenance == (0, 1)
    for parameter in parameter_plan(source, tp=1):
        for terms in (found.weights[parameter], found.moments[parameter]):
            assert terms == (Gather(parameter),), parameter
        new = found.fresh[parameter]
        assert not new.whole and new.rows is None and new.cols is None
    assert all(vars(scale) == dict.fromkeys(vars(scale), 1.0) for scale in found.scales.values())


def parts_of(term: Term | Fill) -> list[Any]:
    """Everything that a term or a fill says, in a form that can be compared."""
    flat: list[Any] = []
    for value in vars(term).values():
        flat += [value.index, value.scale] if isinstance(value, Axis) else [value]
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in flat]


def all_parts(found: GrowthMap) -> list[Any]:
    tables = (found.weights, found.moments, found.fills)
    return [[name, *map(parts_of, t[name])] for t in tables for name in t]


@pytest.mark.parametrize("name", OPERATORS)
@few
@given(st.data())
def test_chance_depends_on_the_stream_and_the_name_alone(name: OperatorName, data: Any) -> None:
    """All ranks make the same map, and two growths of a run, or two seeds, different ones."""
    found = data.draw(cases(name))
    again, other = (
        growth_map(found.source, found.target, found.options, stream)
        for stream in ("7/stage-1", "7/stage-2")
    )
    assert all_parts(found.growth) == all_parts(again)
    streams = [fill.stream for fills in found.growth.fills.values() for fill in fills]
    assert len(set(streams)) == len(streams)
    assert all(s.startswith("7/stage-1/") for s in streams)
    if streams or any(isinstance(t, Dense) for ts in other.weights.values() for t in ts):
        assert all_parts(found.growth) != all_parts(other)


@few
@given(cases("lemon", noise=1.0), st.data())
def test_any_rows_of_a_fill_can_be_made_alone(found: Case, data: st.DataObject) -> None:
    """Element (i, j) is number i * cols + j of its stream, whoever makes it; what is taken out so
    that noise cancels needs no other row."""
    plan = parameter_plan(found.target, tp=1)
    for name, fills in found.growth.fills.items():
        rows, cols = plan[name].rows, plan[name].cols
        first = data.draw(st.integers(0, rows - 1))
        for fill in fills:
            whole = filled(fill, rows, cols)
            noise = normal(fill.stream, first * cols, cols).double()
            expected = noise.clone()
            if fill.center is not None:
                for label in set(fill.center.tolist()):
                    same = torch.from_numpy(fill.center == label)
                    expected[same] -= noise[same].mean()
            new_row = fill.new_rows is not None and bool(fill.new_rows[first])
            new_cols = np.zeros(cols, bool) if fill.new_cols is None else fill.new_cols
            std = torch.tensor([fill.std[new_row][int(new)] for new in new_cols])
            initial = initial_values(fill.initial, fill.stream, range(first, first + 1), cols)[0]
            expected = expected * std + initial.double() * new_row
            assert torch.allclose(whole[first], expected.double(), rtol=1e-6, atol=1e-12)


def count(model: ModelConfig) -> int:
    """Parameters of a Llama, by its sizes."""
    d, f, v, head = model.hidden_size, model.intermediate_size, model.vocab_size, model.head_dim
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    layer = heads * head * d + 3 * d * f + 2 * d
    embeddings = v * d * (1 if model.tie_word_embeddings else 2)
    return model.num_hidden_layers * layer + d + embeddings


@pytest.mark.parametrize("name", OPERATORS)
@few
@given(st.data())
def test_the_books(name: OperatorName, data: st.DataObject) -> None:
    """Parameters are counted, come from their like, and stay in their optimizer group."""
    found = data.draw(cases(name))
    before, after = (parameter_plan(m, tp=1) for m in (found.source, found.target))
    assert sum(spec.rows * spec.cols for spec in after.values()) == count(found.target)
    assert found.growth.weights.keys() == found.growth.moments.keys() == after.keys()
    scales = found.growth.scales
    old, new = (
        {name: group for group in parameter_groups(plan, DECAY, of) for name in group.names}
        for plan, of in ((before, {}), (after, scales))
    )
    for parameter, spec in after.items():
        assert new[parameter].scale == scales.get(parameter, ParamScale())
        for term in (*found.growth.weights[parameter], *found.growth.moments[parameter]):
            for origin in term.sources:
                assert origin.split(".")[3:] == parameter.split(".")[3:]
                assert old[origin].decays == new[parameter].decays
                if spec.layer is not None and name != "bert2bert_aki":
                    assert before[origin].layer == found.growth.provenance[spec.layer]
    assert len(found.growth.provenance) == found.target.num_hidden_layers
    assert all(-1 <= p < found.source.num_hidden_layers for p in found.growth.provenance)


DECAY = OptimizerConfig(lr=1.0, weight_decay_on="matrices")
