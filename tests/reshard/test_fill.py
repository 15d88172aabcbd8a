"""Numbers that come from no source: by their definition, and the same bits on every layout."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import megagrow.reshard.fill
from megagrow.config.schema import ModelConfig
from megagrow.growth.map import Fill, GrowthMap
from megagrow.parallel.sharding import ADAMW_KINDS, Storage
from megagrow.reshard.fill import fill_initial, fill_new, initial_rows
from megagrow.reshard.layout import Layout
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import State, empty_storage, filled, same, storage_of
from tests.helpers.reshard.growths import fills_of
from tests.helpers.reshard.models import layout_of, layouts, models

thorough = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def made_by(growth: GrowthMap, layout: Layout, rank: int, at_once: int) -> Storage:
    """State of a rank after a fill in pieces of this many elements, projected 4 rows at once."""
    storage = empty_storage(layout, rank, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megagrow.reshard.fill, "ELEMENTS_AT_ONCE", at_once)
        patch.setattr(megagrow.reshard.fill, "_PROJECTED_ROWS", 4)
        fill_new(growth, layout, rank, storage)
    return storage


def whole(growth: GrowthMap, config: ModelConfig) -> State:
    """State of one rank alone, all rows being drawn at once; the moments zero."""
    alone = layout_of(config, 0, 1, 1)
    storage = made_by(growth, alone, 0, 10**6)
    return {
        name: {kind: storage[name][kind].view(spec.rows, spec.cols) for kind in ADAMW_KINDS}
        for name, spec in alone.plan.items()
    }


@thorough
@given(st.data(), models(), st.integers(1, 400))
def test_every_layout_holds_the_same_bits_of_any_fill(data, config, at_once):
    layout = data.draw(layouts(config))
    fills = {
        name: tuple(data.draw(fills_of(f"{name}/{i}", spec, projected=True)) for i in range(2))
        for name, spec in layout.plan.items()
        if data.draw(st.booleans())
    }
    growth = GrowthMap({}, {}, fills)
    state = whole(growth, config)
    for name, kinds in state.items():
        rows, cols = kinds["fp32"].shape
        total = sum((filled(fill, rows, cols) for fill in fills.get(name, ())), torch.zeros(1))
        assert torch.allclose(kinds["fp32"].double(), total.double(), atol=1e-6)
    for rank in range(layout.world_size):
        # Padding is zero, as in the definition's storage.
        assert same(made_by(growth, layout, rank, at_once), storage_of(layout, state, rank))


def one_fill(fill: Fill, name: str = "model.layers.0.mlp.up_proj.weight") -> torch.Tensor:
    return whole(GrowthMap({}, {}, {name: (fill,)}), tiny())[name]["fp32"]


def test_centered_normals_cancel_in_what_copies_compute():
    center = np.arange(32) % 8
    values = one_fill(Fill("noise", ((1.0, 1.0), (1.0, 1.0)), center=center))
    assert values.std() > 0.5
    assert values.view(-1, 4, 8).sum(1).abs().max() < 1e-5


def test_projected_normals_vanish_on_the_basis():
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 12)))[0]
    values = one_fill(Fill("noise", ((1.0, 1.0), (1.0, 1.0)), basis=basis))
    assert values.std() > 0.5
    assert (values.double() @ torch.from_numpy(basis)).abs().max() < 1e-5


def test_streams_differ_and_repeat():
    one, again, other = (one_fill(Fill(s, ((1.0, 0), (0, 0)))) for s in ("a", "a", "b"))
    assert torch.equal(one, again)
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.1


def test_initial_weights_are_those_of_the_initialiser():
    layout = layout_of(tiny(), 3, 2, 2)
    whole_state = {
        name: dict.fromkeys(ADAMW_KINDS, torch.zeros(spec.rows, spec.cols))
        | {"fp32": initial_rows(spec, 7, range(spec.rows))}
        for name, spec in layout.plan.items()
    }
    for rank in range(4):
        mine = empty_storage(layout, rank, 0.0)
        fill_initial(layout, rank, mine, 7)
        assert same(mine, storage_of(layout, whole_state, rank))
