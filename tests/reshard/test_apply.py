"""Terms and fills, applied to any rectangle by small pieces, are those of the whole tensor."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.growth.map import Axis, Dense, Fill, Gather, GrowthMap
from megagrow.growth.map import StateKind as StateKind
from megagrow.model.layers.base import ZEROS, InitialValues
from megagrow.parallel.sharding import ADAMW_KINDS, parameter_plan
from megagrow.reshard.apply import Application
from megagrow.reshard.layout import Block
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import models
from tools.docs.operators.dense_growth import State, grown

SOURCE = tiny(num_hidden_layers=1, hidden_size=8, intermediate_size=6, vocab_size=11)
TARGET = SOURCE.model_copy(update={"hidden_size": 12, "intermediate_size": 9})
NAME = "model.layers.0.mlp.up_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
GAIN = "model.norm.weight"


def applied(
    growth: GrowthMap, source: ModelConfig, target: ModelConfig, state: State, at_once: int
) -> Application:
    """The map applied to a state; fails if more of it is read than `at_once`, or one row."""
    plan = parameter_plan(source, 1).values()
    most = max(at_once, *(spec.rows if spec.is_vector else spec.cols for spec in plan))

    def read(name: str, kind: str, block: Block) -> Tensor:
        rows, cols = block
        assert len(rows) * len(cols) <= most
        return state[name][kind][rows.start : rows.stop, cols.start : cols.stop]

    return Application(read, parameter_plan(source, 1), growth, parameter_plan(target, 1), at_once)


def matrix(rows: int, cols: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols))


DENSE = {
    "left": Dense((NAME,), (1.0,), left=matrix(9, 6, 0), right=matrix(12, 8, 1)),
    "right": Dense((NAME, GATE), (0.5, -2.0), right=matrix(12, 8, 2), left=matrix(9, 6, 3)),
    "gain": Dense((NAME,), (1.0,), matrix(9, 6, 4), matrix(12, 8, 5), gain=GAIN),
    "inverse": Dense((GATE,), (3.0,), matrix(9, 6, 6), matrix(12, 8, 7), GAIN, gain_power=-1),
}


@pytest.mark.parametrize("at_once", [1, 20, 1000])
@pytest.mark.parametrize("name", DENSE)
def test_dense_terms_are_products_of_whole_matrices(name, at_once):
    terms = {NAME: (DENSE[name],)}
    state = random_state(parameter_plan(SOURCE, 1))
    fills = {NAME: (Fill("s", std=((1.0, 1.0), (1.0, 1.0))),)}
    growth = GrowthMap(terms, terms, fills)
    doubles = {n: {k: t.double() for k, t in kinds.items()} for n, kinds in state.items()}
    only = GrowthMap({n: terms.get(n, ()) for n in parameter_plan(TARGET, 1)}, terms, fills)
    wanted = grown(doubles, only, TARGET)[NAME]
    found = applied(growth, SOURCE, TARGET, state, at_once)
    for kind in ADAMW_KINDS:
        for rows, cols in ((range(9), range(12)), (range(3, 8), range(2, 3))):
            values = found.block(NAME, kind, Block(rows, cols))
            part = wanted[kind][rows.start : rows.stop, cols.start : cols.stop].float()
            torch.testing.assert_close(values, part, rtol=1e-6, atol=1e-6)


def test_one_side_alone_and_a_gain_of_zero():
    state = random_state(parameter_plan(SOURCE, 1))
    state[GAIN]["fp32"][3] = 0.0
    down, wide = "model.layers.0.mlp.down_proj.weight", matrix(12, 8, 8)
    terms = {
        down: (Dense((down,), (1.0,), left=wide),),
        GATE: (Dense((GATE,), (1.0,), right=wide, gain=GAIN, gain_power=-1),),
    }
    found = applied(GrowthMap(terms, terms), SOURCE, TARGET, state, 32)
    left = torch.from_numpy(wide)
    for kind in ("fp32", "exp_avg"):
        values = found.block(down, kind, Block(range(12), range(1, 6)))
        wanted = (left @ state[down][kind].double())[:, 1:6].float()
        torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6)
        gain = state[GAIN]["fp32"].double().ravel()
        gain = torch.tensor([0.0 if g == 0 else 1 / g for g in gain.tolist()])
        values = found.block(GATE, kind, Block(range(2, 6), range(12)))
        wanted = ((state[GATE][kind].double() * gain) @ left.T)[2:6].float()
        torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6)


@st.composite
def axes(draw: st.DrawFn, old: int, new: int) -> Axis:
    """Copies side by side, one after the other, or anyhow, with gaps; with or without scales."""
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    positions = np.arange(new)
    listed = (
        positions % old,
        positions * old // new,
        generator.integers(-1, old, new),
        np.where(positions < old, positions, -1),
    )
    index = draw(st.sampled_from(listed))
    return Axis(index, generator.uniform(0.2, 2.0, new) if draw(st.booleans()) else None)


@settings(deadline=None, max_examples=60)
@given(st.data(), models(), st.integers(1, 200))
def test_gathers_are_those_of_the_whole_tensor_to_the_bit(data, model, at_once):
    name, state = "model.layers.0.mlp.down_proj.weight", random_state(parameter_plan(model, 1))
    sizes = {"hidden_size": model.hidden_size + 4, "intermediate_size": model.intermediate_size + 3}
    target = model.model_copy(update=sizes)
    before, after = parameter_plan(model, 1)[name], parameter_plan(target, 1)[name]
    along = data.draw(axes(before.rows, after.rows)), data.draw(axes(before.cols, after.cols))
    std = data.draw(st.sampled_from((0.0, 0.7)))
    terms = {name: (Gather(name, *along),)}
    fills = {name: (Fill("s", ((std, std), (std, std))),)}
    whole = GrowthMap({n: terms.get(n, ()) for n in parameter_plan(target, 1)}, terms, fills)
    found = applied(GrowthMap(terms, terms, fills), model, target, state, at_once)
    rows = data.draw(st.integers(0, after.rows - 1))
    cols = data.draw(st.integers(0, after.cols - 1))
    block = Block(range(rows, after.rows), range(cols, after.cols))
    for kind in ADAMW_KINDS:
        wanted = grown(state, whole, target)[name][kind][rows:, cols:]
        assert torch.equal(found.block(name, kind, block), wanted)


FILLS = {
    "quadrants": Fill("a", ((0.0, 1.0), (2.0, 3.0)), ZEROS, np.arange(9) > 5, np.arange(12) > 7),
    "constant": Fill("b", initial=InitialValues("constant", 1.5), new_rows=np.arange(9) % 2 == 0),
    "center": Fill("c", ((1.0, 1.0), (1.0, 1.0)), center=np.arange(12) % 5),
    "basis": Fill("d", ((1.0, 1.0), (1.0, 1.0)), basis=np.linalg.qr(matrix(12, 4, 9))[0]),
}


@pytest.mark.parametrize("name", FILLS)
def test_fills_are_those_of_the_whole_tensor(name):
    fill = FILLS[name]
    growth = GrowthMap({NAME: ()}, {}, {NAME: (fill, Fill("e", ((1.0, 1.0), (1.0, 1.0))))})
    state = random_state(parameter_plan(SOURCE, 1))
    whole = GrowthMap(dict.fromkeys(parameter_plan(TARGET, 1), ()), {}, growth.fills)
    wanted = grown(state, whole, TARGET)[NAME]["fp32"]
    found = applied(growth, SOURCE, TARGET, state, 10)
    values = found.block(NAME, "fp32", Block(range(9), range(12)))
    torch.testing.assert_close(values, wanted, rtol=1e-6, atol=1e-6)
    # The same bits, however it is cut.
    for row in range(9):
        part = found.block(NAME, "fp32", Block(range(row, row + 1), range(2, 11)))
        assert torch.equal(part, values[row : row + 1, 2:11])
    assert not found.block(NAME, "exp_avg", Block(range(9), range(12))).any()
