"""Growth of what is spread over ranks: the shards of the grown model, and what has to move for it.

The copies of a plan are carried out on logical tensors of which a rank sees only what it holds.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagrow.config.growth import OperatorName
from megagrow.config.schema import ModelConfig
from megagrow.growth.map import Axis, Dense, Gather
from megagrow.growth.operators import OPERATORS
from megagrow.parallel.sharding import ADAMW_KINDS, parameter_plan
from megagrow.reshard.copy_plan import Copy, copies_to
from megagrow.reshard.layout import Layout
from tests.helpers.growth.cases import Case, case, cases, sources, times
from tests.helpers.growth.computing import random_moments
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import held, numbered
from tests.helpers.reshard.models import layout_of
from tools.docs.operators.dense_growth import State, filled, grown

GATHERED = tuple(name for name in OPERATORS if name != "isometric")

HIDDEN = -1
"""Stands for an element that a rank does not hold, and for the padding of the vocabulary."""


@st.composite
def spreadable(draw: st.DrawFn, name: OperatorName) -> ModelConfig:
    """A source that 1, 2 or 4 tensor-parallel ranks can share, its vocabulary with padding."""
    heads = draw(st.sampled_from((1, 2, 4)))
    source = draw(sources(layers=2 if name == "lidas" else None))
    sizes = times(source, 1, 1, 1) | {
        "num_key_value_heads": heads,
        "num_attention_heads": heads * draw(st.sampled_from((1, 2))),
        "intermediate_size": heads * draw(st.integers(1, 2)),
    }
    return source.model_copy(update=sizes)


@st.composite
def layouts_for(draw: st.DrawFn, model: ModelConfig) -> Layout:
    """Any layout in which tensor parallelism divides the heads and the feed-forward width."""
    shared = (model.num_key_value_heads, model.intermediate_size)
    tp = draw(st.sampled_from([tp for tp in (1, 2, 4) if all(n % tp == 0 for n in shared)]))
    decay = draw(st.sampled_from(("all", "matrices")))
    return layout_of(model, draw(st.integers(0, 3)), draw(st.integers(1, 3)), tp, decay)


def sight(layout: Layout, rank: int) -> dict[str, Tensor]:
    """Which elements of the logical tensors a rank holds, (rows, cols) booleans."""
    numbers = numbered(layout.plan)
    mine = held(layout, numbers, rank, HIDDEN)
    return {
        name: torch.isin(whole, mine[name]) if name in mine else torch.zeros_like(whole, dtype=bool)
        for name, whole in numbers.items()
    }


def seen(state: State, layout: Layout, rank: int) -> State:
    """A state as a rank sees it: NaN where it holds nothing."""
    mine = sight(layout, rank)
    return {
        name: {kind: t.where(mine[name], torch.nan) for kind, t in kinds.items()}
        for name, kinds in state.items()
    }


def in_fp32(config: ModelConfig) -> State:
    return {n: {k: t.float() for k, t in ks.items()} for n, ks in random_moments(config).items()}


def begun(found: Case) -> State:
    """State of a target before anything comes from the source: its fills."""
    out = {}
    for name, spec in parameter_plan(found.target, tp=1).items():
        zeros = torch.zeros(spec.rows, spec.cols)
        fills = [filled(f, spec.rows, spec.cols).float() for f in found.growth.fills.get(name, ())]
        out[name] = {kind: zeros.clone() for kind in ADAMW_KINDS} | {"fp32": sum(fills, zeros)}
    return out


def carry_out(copy: Copy, theirs: State, mine: State) -> None:
    """Result of a copy, computed with indices of logical tensors."""
    positions = (
        torch.from_numpy(np.asarray(taken)) + held_from.start
        for taken, held_from in zip((copy.take_rows, copy.take_cols), copy.source, strict=True)
    )
    rows, cols = positions
    values = theirs[copy.term.source][copy.kind][rows][:, cols]
    to = [torch.from_numpy(np.asarray(p)) for p in (copy.target_rows, copy.target_cols)]
    for axis, where, shape in (
        (copy.term.rows, to[0], (-1, 1)),
        (copy.term.cols, to[1], (1, -1)),
    ):
        if axis.scale is not None:
            values = values * torch.from_numpy(axis.scale)[where].float().view(shape)
    into = mine[copy.name][copy.kind]
    at = (to[0][:, None], to[1])
    into[at] = into[at] + values if copy.adds else values


@pytest.mark.parametrize("name", GATHERED)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_the_shards_of_the_grown_model_grow_from_the_shards_of_the_source(
    name: OperatorName, data: st.DataObject
) -> None:
    """gather(grow(shard(S))) == grow(S) for weights and moments, to the bit, between any layouts;
    no padding is read, and none is written."""
    found = data.draw(cases(name, source=data.draw(spreadable(name))))
    before, after = data.draw(layouts_for(found.source)), data.draw(layouts_for(found.target))
    whole = in_fp32(found.source)
    expected = grown(whole, found.growth, found.target)
    views = [seen(whole, before, rank) for rank in range(before.world_size)]
    for rank in range(after.world_size):
        mine, holds = begun(found), sight(after, rank)
        for kind in found.growth.kinds:
            for copy in copies_to(rank, before, found.growth, after, kind):
                carry_out(copy, views[copy.source_rank], mine)
        for parameter, kinds in mine.items():
            for kind, tensor in kinds.items():
                there = holds[parameter]
                right = expected[parameter][kind]
                assert torch.equal(tensor[there], right[there]), (parameter, kind, rank)


def between(found: Case, before: Layout, after: Layout, apart: Any) -> Iterator[tuple[str, Tensor]]:
    """Elements that the copies of all ranks bring from a rank that is `apart`, by parameter."""
    for rank in range(after.world_size):
        for copy in copies_to(rank, before, found.growth, after, "fp32"):
            if apart(copy.source_rank, rank):
                yield copy.name, copy.shape[0] * copy.shape[1]


def at_least(found: Case, before: Layout, after: Layout) -> int:
    """Elements that the target's ranks need and do not hold themselves, counted one by one."""
    numbers, origins = numbered(before.plan), {}
    for name, terms in found.growth.weights.items():
        spec = after.plan[name]
        origins[name] = torch.full((spec.rows, spec.cols), HIDDEN)
        for term in terms:
            assert isinstance(term, Gather)
            at = [indices(a, n) for a, n in ((term.rows, spec.rows), (term.cols, spec.cols))]
            taken = numbers[term.source][at[0]][:, at[1]]
            inside = (at[0] >= 0)[:, None] & (at[1] >= 0)
            origins[name] = taken.where(inside, origins[name])
    count = 0
    for rank in range(after.world_size):
        needed = torch.cat([*held(after, origins, rank, HIDDEN).values()])
        mine = torch.cat([*held(before, numbers, rank, HIDDEN).values()])
        count += int(((needed >= 0) & ~torch.isin(needed, mine)).sum())
    return count


def indices(axis: Axis, size: int) -> Tensor:
    return torch.from_numpy(np.arange(size) if axis.index is None else axis.index)


def other_slice(tp: int) -> Any:
    return lambda one, other: one % tp != other % tp


def elsewhere(one: int, other: int) -> bool:
    return one != other


@settings(max_examples=20, deadline=None)
@given(
    st.data(),
    st.sampled_from(("direct_width", "mup_copy", "zero_depth", "direct_depth")),
    st.sampled_from((2, 4)),
    st.integers(0, 3),
    st.integers(1, 2),
    st.booleans(),
)
def test_copies_side_by_side_never_leave_their_tensor_parallel_rank(
    data: Any, name: OperatorName, tp: int, zero: int, dp: int, tied: bool
) -> None:
    source = tiny(num_key_value_heads=4, num_attention_heads=8, tie_word_embeddings=tied)
    wide = times(source, *data.draw(st.tuples(*[st.integers(1, 3)] * 3)))
    target = wide if OPERATORS[name].wider else {"num_hidden_layers": 4}
    found = case(source, target, operator=name)
    before, after = (layout_of(m, zero, dp, tp) for m in (found.source, found.target))
    assert list(between(found, before, after, other_slice(tp))) == []
    if zero == 0:
        assert list(between(found, before, after, elsewhere)) == []
    moved = sum(count for _, count in between(found, before, after, elsewhere))
    assert moved == at_least(found, before, after)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_tiled_axis_moves_between_tensor_parallel_ranks(tp: int) -> None:
    """All that tensor parallelism slices but the vocabulary, and the exact number of elements."""
    source = tiny(num_key_value_heads=4, num_attention_heads=8)
    found = case(source, times(source, 1, 2, 2), operator="direct_width", copy_order="tiled")
    before, after = (layout_of(m, 0, 1, tp) for m in (found.source, found.target))
    moved = list(between(found, before, after, other_slice(tp)))
    assert {name.split(".")[-2] for name, _ in moved} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    # Of what a rank needs it holds one part in tp.
    sliced = sum(spec.rows * spec.cols for spec in after.plan.values() if spec.layer is not None)
    vectors = sum(
        spec.rows for spec in after.plan.values() if spec.is_vector and spec.layer is not None
    )
    assert sum(count for _, count in moved) == (sliced - vectors) * (tp - 1) // tp
    assert sum(count for _, count in moved) == at_least(found, before, after)


def test_dense_terms_are_all_that_is_not_looked_at_here() -> None:
    found = case(tiny(), {"hidden_size": 40}, operator="isometric")
    terms = [term for terms in found.growth.weights.values() for term in terms]
    assert terms and all(isinstance(term, Dense) for term in terms)
