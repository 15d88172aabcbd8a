"""What a run file is told about probes, ramps and rates of its growths."""

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
    ("growth", "said"),
    [
        (
            {"operator": "zero_depth", "probe": {"operators": ["direct_depth", "solar"]}},
            f"{AT} has both an operator and a probe of several: leave one of them out",
        ),
        (
            {"probe": {"operators": ["direct_depth", "learn_depth"]}},
            f"{AT}.probe: learn_depth is trained by itself and can not be a candidate",
        ),
        (
            {"probe": {"operators": ["direct_depth", "lidas"]}},
            "stages.1.model.num_hidden_layers = 4: lidas adds one block, whose size divides the 2 "
            "layers into at least 2",
        ),
        (
            {"new_entries": {}},
            f"{AT}.lr_schedule = rewarm: the rate of new entries begins at that of the growth, "
            "which warm-up has just put near zero; set it to continue or by_size",
        ),
        (
            {"operator": "random_depth", "optimizer_state": "estimate_second_moment"},
            f"{AT}.optimizer_state = estimate_second_moment: random_depth has no new entries with "
            "a gradient at "
            "the growth; choose another",
        ),
    ],
    ids=str,
)
def test_what_is_wrong(tmp_path, growth, said):
    assert said in problems(tmp_path, growth)
