"""Under any TP, sequence parallelism and ZeRO stage each family is still Hugging Face's model."""

from unittest.mock import patch

import pytest

from megagrow.parallel import tensor_parallel
from tests.helpers.families import FAMILIES, of_family
from tests.helpers.hugging_face import tiny
from tests.helpers.spawn import run_ranks
from tests.parallel.test_parity import GRIDS, LIMIT, WORLD, Measure, compare, measure_of, norm_of

MODELS = {name: of_family(name, num_attention_heads=8, num_key_value_heads=4) for name in FAMILIES}
SHARDED = ((1, 2, True), (2, 4, False), (3, 2, True, "selective"), (0, 4, True, "full"))
MODELS["no layers"] = tiny(num_hidden_layers=0)
CASES = [(name, grid) for name in MODELS for grid in (*GRIDS, *SHARDED)]

FAILS = 1e-3
CONTROLS = (("olmo2", "PartialSum"), ("qwen3", "SharedWeight"))
"""Placeholders of the norms of queries and keys: family and class."""


class Unmarked:
    """Class of no module."""


@pytest.fixture(scope="module")
def measures() -> dict[str, Measure]:
    return {name: measure_of(config) for name, config in MODELS.items()}


def compare_all(measures: dict[str, Measure], cases: list) -> list[dict]:
    return [compare(MODELS[name], measures[name], case) for name, case in cases]


def without_collectives(measures: dict[str, Measure]) -> list[dict]:
    found = []
    for name, placeholder in CONTROLS:
        with patch.object(tensor_parallel, placeholder, Unmarked):
            found.append(compare(MODELS[name], measures[name], (0, 2, False)))
    return found


@pytest.mark.dist
def test_every_family_is_hugging_faces_in_every_layout(measures):
    for rank, found in enumerate(run_ranks(WORLD, compare_all, measures, CASES)):
        for (name, case), result in zip(CASES, found, strict=True):
            here = (rank, name, case)
            norm = norm_of(measures[name].gradients)
            assert result["logits"] < LIMIT, here
            assert result["norm"] == pytest.approx(norm, rel=1e-5), here
            for parameter, difference in result["gradients"].items():
                assert difference < LIMIT, (*here, parameter)
            assert (result["padding"] == 0).all(), here


@pytest.mark.dist
def test_norms_of_queries_and_keys_need_their_collectives(measures):
    for full_width, per_head in run_ranks(WORLD, without_collectives, measures):
        assert full_width["logits"] > FAILS
        assert per_head["logits"] < LIMIT, "the shared gain matters in the backward pass only"
        wrong = {n for n, difference in per_head["gradients"].items() if difference > FAILS}
        assert wrong and all(n.endswith(("q_norm.weight", "k_norm.weight")) for n in wrong)
