"""Dense terms on four ranks, against products of whole tensors."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist

import megagrow.reshard.dense
from megagrow.growth.map import Axis, Dense, Fill, Gather, GrowthMap, Term
from megagrow.parallel.sharding import ADAMW_KINDS
from megagrow.reshard.dense import exchange_dense
from megagrow.reshard.exchange import ShardedState, exchange
from megagrow.reshard.fill import fill_new
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import (
    State,
    empty_storage,
    grown,
    random_state,
    storage_of,
)
from tests.helpers.reshard.models import layout_of
from tests.helpers.spawn import run_ranks

WORLD = 4
SMALL = tiny(hidden_size=16, intermediate_size=24)
WIDE = tiny(hidden_size=24, head_dim=4, intermediate_size=32)
GRIDS = (
    ((3, 2, 2), (1, 4, 1)),
    ((2, 4, 1), (3, 1, 4)),
    ((0, 2, 2), (0, 4, 1)),
    ((1, 2, 2), (2, 2, 2)),
)
"""(ZeRO stage, DP, TP) before and after."""


@functools.cache
def dense_map() -> GrowthMap:
    """Matrices are turned on the sides that grow, those of layer 1 mixed out of both layers; the
    head has a norm folded in; embeddings are gathered, and layer 0 is also filled."""
    generator = np.random.default_rng(0)
    source, target = layout_of(SMALL, 0, 1, 1).plan, layout_of(WIDE, 0, 1, 1).plan
    weights: dict[str, tuple[Term, ...]] = {}
    moments: dict[str, tuple[Term, ...]] = {}
    fills: dict[str, tuple[Fill, ...]] = {}
    for name, spec in target.items():
        left = turned(generator, spec.rows, source[name].rows)
        right = turned(generator, spec.cols, source[name].cols)
        if spec.layer == 1:
            both = (name.replace("layers.1", "layers.0"), name)
            term: Term = Dense(both, (0.7, -0.4), left, right)
        elif name == "lm_head.weight":
            term = Dense((name,), (1.0,), left, right, "model.norm.weight")
        elif name == "model.embed_tokens.weight":
            term = Gather(name, cols=Axis(np.arange(spec.cols) % source[name].cols))
        else:
            term = Dense((name,), (1.5,), left, right)
        weights[name] = moments[name] = (term,)
        if isinstance(term, Dense) and term.gain:
            moments[name] = (replace(term, gain_power=-1),)
        if spec.layer == 0:
            fills[name] = (Fill(name, ((0.1, 0.1), (0.1, 0.1))),)
    return GrowthMap(weights, moments, fills)


def turned(generator: np.random.Generator, rows: int, cols: int) -> np.ndarray | None:
    """Any matrix, or none where the size stays."""
    return None if rows == cols else generator.standard_normal((rows, cols)) / cols**0.5


def source_state() -> State:
    """Gains are far from 0, but for one that is 0."""
    state = random_state(layout_of(SMALL, 0, 1, 1).plan)
    gain = state["model.norm.weight"]["fp32"]
    gain.abs_().add_(0.5)[3] = 0.0
    return state


def worst(found: dict, expected: dict) -> float:
    """The largest difference of any tensor, relative to its largest number."""
    return max(
        float(
            (found[name][kind] - expected[name][kind]).abs().max()
            / expected[name][kind].abs().max()
        )
        for name in expected
        for kind in ADAMW_KINDS
    )


def differences(pieces: int) -> list[tuple[float, int]]:
    """For each grid how far this rank's target is from the definition, and the bytes it sent."""
    rank, state, growth, out = dist.get_rank(), source_state(), dense_map(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megagrow.reshard.dense, "_ELEMENTS_AT_ONCE", pieces)
        patch.setattr(megagrow.reshard.dense, "BUCKET_BYTES", 4 * pieces)
        for before, after in GRIDS:
            old, new = layout_of(SMALL, *before), layout_of(WIDE, *after)
            source = ShardedState(old, storage_of(old, state, rank))
            target = ShardedState(new, empty_storage(new, rank, 0.0))
            fill_new(growth, new, rank, target.storage)
            exchange(source, growth, target)
            moved = exchange_dense(source, growth, target)
            expected = storage_of(new, grown(state, growth, new.plan), rank)
            out.append((worst(target.storage, expected), moved.bytes_sent))
    return out


@pytest.mark.dist
@pytest.mark.parametrize("pieces", [100, 2**20])
def test_dense_terms_are_products_of_whole_tensors_on_every_layout(pieces):
    mixes = 0
    plan = layout_of(SMALL, 0, 1, 1).plan
    for name, (term,) in dense_map().weights.items():
        if isinstance(term, Dense):
            gain = 0 if term.gain is None else plan[term.gain].rows
            mixes += 3 * 4 * (plan[name].rows * plan[name].cols + gain)
    for rank in run_ranks(WORLD, differences, pieces):
        for difference, sent in rank:
            assert difference < 1e-6
            assert sent == pytest.approx(2 * mixes * (WORLD - 1) / WORLD, rel=1e-3)


def test_terms_that_read_the_same_mix_gather_it_once():
    name = "model.layers.0.mlp.up_proj.weight"
    terms = [Dense((name,), (1.0,), right=np.eye(16)), Dense((name,), (1.0,))]
    target = layout_of(SMALL, 0, 1, 1)
    weights: dict[str, tuple[Term, ...]] = dict.fromkeys(target.plan, ())
    weights |= {f"model.layers.{i}.mlp.up_proj.weight": (term,) for i, term in enumerate(terms)}
    growth = GrowthMap(weights, {}, kinds=("fp32",))
    by_mix = megagrow.reshard.dense._by_mix(target, growth, target)
    assert [len(readers) for readers in by_mix.values()] == [2]
