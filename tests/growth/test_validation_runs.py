"""Errors for probes, mask ramps and learning rates of growths."""

from typing import Any

import pytest

from megagrow.growth.validation import growth_problems
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run

DEEP = MODEL | {"num_hidden_layers": 4}
AT = "stages.1.growth"


def problems(folder: Any, growth: dict[str, Any], model: dict[str, Any] = DEEP) -> list[str]:
    sizes = {"tokens": 4 * STEP_TOKENS}
    return growth_problems(make_run(folder, [sizes, {"model": model, "growth": growth, **sizes}]))


@pytest.mark.parametrize(
    "growth",
    [
        {"probe": {"operators": ["direct_depth", "zero_depth"]}},
        {"probe": {"operators": ["solar", "random_depth"], "steps": 3}},
        {"new_entries": {}, "lr_schedule": "continue"},
    ],
    ids=str,
)
def test_what_is_right(tmp_path, growth):
    assert problems(tmp_path, growth) == []


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        (
            {"operator": "zero_depth", "probe": {"operators": ["direct_depth", "solar"]}},
            f"{AT} sets both operator and probe; remove one of them",
        ),
        (
            {"probe": {"operators": ["direct_depth", "learn_depth"]}},
            f"{AT}.probe: learn_depth is learned and cannot be probed; remove it",
        ),
        (
            {"probe": {"operators": ["direct_depth", "lidas"]}},
            "stages.1.model.num_hidden_layers = 4: lidas adds one block, whose size must divide "
            "the 2 source layers into 2 or more blocks",
        ),
        (
            {"new_entries": {}},
            f"{AT}.lr_schedule = rewarm: the learning rate of new entries starts from the rate "
            "at the growth, which rewarm sets near zero; set it to continue or by_size",
        ),
        (
            {"operator": "random_depth", "optimizer_state": "estimate_second_moment"},
            f"{AT}.optimizer_state = estimate_second_moment: new entries of random_depth "
            "have no gradient at the growth; use another policy",
        ),
    ],
    ids=str,
)
def test_what_is_wrong(tmp_path, growth, message):
    assert message in problems(tmp_path, growth)
