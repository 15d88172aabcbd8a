"""A growth map that does not fit its models is refused, and the parameter is named."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config.growth import OperatorName
from megagrow.growth.map import Axis, Dense, Fill, Gather, GrowthMap, Term
from megagrow.growth.map_checks import check_map
from megagrow.growth.operators import OPERATORS
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.growth.cases import case, cases, times
from tests.helpers.hugging_face import tiny

SOURCE = tiny(num_hidden_layers=2, hidden_size=8, head_dim=4, intermediate_size=6)
TARGET = SOURCE.model_copy(update=times(SOURCE, 2, 1, 1))
RIGHT = case(SOURCE, times(SOURCE, 2, 1, 1), operator="direct_width").growth

GATE = "model.layers.1.mlp.gate_proj.weight"
"""6 x 8 in the source, 6 x 16 in the target."""
UP = GATE.replace("gate", "up")
NORM = "model.layers.1.input_layernorm.weight"
COLS = RIGHT.weights[GATE][0].cols


def check(growth: GrowthMap) -> None:
    check_map(growth, parameter_plan(SOURCE, tp=1), parameter_plan(TARGET, tp=1))


def with_terms(*terms: Term, moments: bool = False) -> GrowthMap:
    """The right map, but for what the gate is made of."""
    table = RIGHT.moments if moments else RIGHT.weights
    return replace(RIGHT, **{"moments" if moments else "weights": {**table, GATE: terms}})


def with_fill(fill: Fill) -> GrowthMap:
    return replace(RIGHT, fills={GATE: (fill,)})


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_every_operator_makes_maps_that_fit(name: OperatorName, data: st.DataObject) -> None:
    found = data.draw(cases(name))
    before, after = (parameter_plan(model, tp=1) for model in (found.source, found.target))
    check_map(found.growth, before, after)


def without(name: str) -> GrowthMap:
    return replace(RIGHT, weights={n: t for n, t in RIGHT.weights.items() if n != name})


def rows(*index: int) -> Gather:
    """Some rows of the gate, -1 standing for none."""
    return Gather(GATE, Axis(np.array(index)), COLS)


def dense(**changes: Any) -> Dense:
    right = np.ones((16, 8))
    return Dense(**{"sources": (GATE, UP), "alphas": (0.5, 0.5), "right": right} | changes)


REFUSED: dict[str, tuple[GrowthMap, str]] = {
    "left out": (without(GATE), f"the growth map omits {GATE}"),
    "a part left out": (
        with_terms(rows(0, 1, 2, -1, -1, 5)),
        f"the growth map covers only a part of {GATE}: 64 of 96 entries come from the source, and "
        "the rest has no fill",
    ),
    "all left out": (
        with_terms(),
        f"the growth map covers only a part of {GATE}: 0 of 96 entries come from the source, and "
        "the rest has no fill",
    ),
    "covered twice": (
        with_terms(rows(0, 1, 2, 3, -1, -1), rows(-1, -1, -1, 0, 4, 5)),
        f"the growth map covers a range of {GATE} twice",
    ),
    "moments covered twice": (
        with_terms(rows(0, 1, 2, 3, -1, -1), rows(-1, -1, -1, 0, 4, 5), moments=True),
        f"the growth map covers a range of {GATE} twice",
    ),
    "unknown source": (
        with_terms(Gather("model.layers.2.mlp.gate_proj.weight", cols=COLS)),
        f"{GATE}: its source model.layers.2.mlp.gate_proj.weight does not exist",
    ),
    "unknown source of moments": (
        with_terms(Gather("nothing", cols=COLS), moments=True),
        f"{GATE}: its source nothing does not exist",
    ),
    "unknown target": (
        replace(RIGHT, weights={**RIGHT.weights, "lm_tail": (Gather(GATE),)}),
        "the growth map defines lm_tail, which the target does not have",
    ),
    "unknown target of moments": (
        replace(RIGHT, moments={**RIGHT.moments, "lm_tail": (Gather(GATE),)}),
        "the growth map defines lm_tail, which the target does not have",
    ),
    "unknown target of a fill": (
        replace(RIGHT, fills={"lm_tail": (Fill("x"),)}),
        "the growth map defines lm_tail, which the target does not have",
    ),
    "size untold": (
        with_terms(Gather(GATE)),
        f"{GATE}: 8 columns become 16, but the axis has no index",
    ),
    "rows of another number": (
        with_terms(rows(0, 1, 2)),
        f"{GATE} has 6 rows, the growth map has 3",
    ),
    "row beyond": (
        with_terms(rows(0, 1, 2, 3, 4, 6)),
        f"{GATE}: the growth map reads rows outside of the source's 6",
    ),
    "row before": (
        with_terms(rows(0, 1, 2, 3, 4, -2)),
        f"{GATE}: the growth map reads rows outside of the source's 6",
    ),
    "column beyond": (
        with_terms(Gather(GATE, cols=Axis(np.arange(16)))),
        f"{GATE}: the growth map reads columns outside of the source's 8",
    ),
    "scales of another number": (
        with_terms(Gather(GATE, Axis(scale=np.ones(5)), COLS)),
        f"{GATE} has 6 rows, but 5 scales",
    ),
    "mixed shapes": (
        with_terms(dense(sources=(GATE, NORM))),
        f"{GATE} mixes {GATE} and {NORM}, whose shapes differ",
    ),
    "factors": (with_terms(dense(alphas=(1.0,))), f"{GATE}: 1 factors for 2 sources"),
    "matrix": (
        with_terms(dense(right=np.ones((8, 16)))),
        f"{GATE}: a matrix (8, 16) for 8 columns that become 16",
    ),
    "no matrix": (
        with_terms(dense(right=None)),
        f"{GATE}: a matrix (8, 8) for 8 columns that become 16",
    ),
    "left matrix": (
        with_terms(dense(left=np.ones((6, 5)))),
        f"{GATE}: a matrix (6, 5) for 6 rows that become 6",
    ),
    "unknown gain": (
        with_terms(dense(gain="model.layers.7.input_layernorm.weight")),
        f"{GATE}: its source model.layers.7.input_layernorm.weight does not exist",
    ),
    "gain of another size": (
        with_terms(dense(gain="lm_head.weight")),
        f"{GATE}: the gain lm_head.weight does not fit {GATE}",
    ),
    "dense twice": (
        with_terms(dense(), rows(-1, -1, -1, -1, -1, 0)),
        f"the growth map covers a range of {GATE} twice",
    ),
    "fill of rows": (
        with_fill(Fill("x", new_rows=np.ones(5, bool))),
        f"{GATE}: a fill for 5 entries of an axis of 6",
    ),
    "fill of columns": (
        with_fill(Fill("x", new_cols=np.ones(8, bool))),
        f"{GATE}: a fill for 8 entries of an axis of 16",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit(what: str) -> None:
    growth, said = REFUSED[what]
    with pytest.raises(ValueError) as refused:
        check(growth)
    assert str(refused.value) == said


def test_what_fits() -> None:
    check(RIGHT)
    check(with_terms(dense()))
    check(with_terms(dense(gain=NORM, left=np.eye(6))))
    check(with_terms(rows(0, 1, 2, -1, -1, -1), rows(-1, -1, -1, 0, 4, 5)))
    check(with_terms(rows(0, 1, 2, -1, -1, -1), moments=True))
    check(with_terms(moments=True))
    partly = replace(with_terms(rows(0, 1, 2, -1, -1, 5)), fills={GATE: (Fill("zeros"),)})
    check(partly)
