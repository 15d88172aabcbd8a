"""Errors for widths, norms and optimizer states that an operator does not support."""

from typing import Any

import pytest

from megagrow.growth.operators import OPERATORS
from tests.helpers.growth.cases import Sizes, widened
from tests.helpers.growth.events import DOUBLE, SOURCE, B, H, layers, problems


def multiple(field: str, new: int, old: int, name: str, fix: str) -> str:
    return (
        f"{H}.model.{field} = {new} is not divisible by {B}.{field} = {old}, which {name} "
        f"requires; {fix}"
    )


ONE_FIELD = ("isometric", "head_dim", "vocabulary")
ANY_SIZE = "lemon and zero_width support any size"

WRONG: list[tuple[Sizes, dict[str, Any], list[str]]] = [
    *[
        (
            {"num_attention_heads": 8},
            {"operator": name},
            [f"{H}.model has 4 query heads per key/value head, {B} has 2; keep the ratio"],
        )
        for name in ("zero_width", "direct_width", "hypercloning", "sparkling", "random_width")
    ],
    *[
        (
            widened(SOURCE, 24, 3, 25),
            {"operator": name},
            [multiple("hidden_size", 24, 16, name, ANY_SIZE)],
        )
        for name in ("direct_width", "learn_width", "net2net_width")
    ],
    *[
        (
            widened(SOURCE, 24, 3, 25),
            {"operator": name},
            [
                multiple("hidden_size", 24, 16, name, ANY_SIZE),
                multiple("num_attention_heads", 6, 4, name, ANY_SIZE),
                multiple("num_key_value_heads", 3, 2, name, ANY_SIZE),
                multiple("intermediate_size", 25, 24, name, ANY_SIZE),
            ],
        )
        for name in ("hypercloning", "mup_copy")
    ],
    (
        widened(SOURCE, 48, 4, 48),
        {"operator": "staged_width"},
        [f"{H}.model.hidden_size = 48: staged_width needs 32, twice the source"],
    ),
    (
        {"head_dim": 6},
        {"operator": "head_dim"},
        [multiple("head_dim", 6, 4, "head_dim", "use a multiple")],
    ),
    # Norms and states.
    *[
        (
            {"hidden_size": 20},
            {"operator": name},
            [
                f"{H}.model.rms_norm_eps = 0.01: {name} changes the mean square of the residual "
                "stream and preserves the function only with 0.008"
            ],
        )
        for name in ("zero_width", "lemon", "isometric")
    ],
    (
        DOUBLE | {"rms_norm_eps": 5e-3},
        {"operator": "direct_width"},
        [
            f"{H}.model.rms_norm_eps = 0.005: direct_width changes the mean square of the residual "
            "stream and preserves the function only with 0.01"
        ],
    ),
    (
        DOUBLE | layers(8),
        {"operator": ["mup_copy", "zero_depth"]},
        [
            f"{H}.growth.exact_continuation requires even copies in width only, no noise, "
            "and optimizer_state = transport; set it to false",
        ],
    ),
    (
        DOUBLE,
        {"operator": "direct_width", "copy_split": "uneven", "exact_continuation": True},
        [
            f"{H}.growth.exact_continuation requires even copies in width only, no noise, "
            "and optimizer_state = transport; set it to false"
        ],
    ),
]


@pytest.mark.parametrize(("target", "options", "message"), WRONG, ids=str)
def test_what_is_wrong(target: Sizes, options: dict[str, Any], message: list[str]) -> None:
    assert problems(target, **options) == message


def test_isometric_needs_an_untied_model() -> None:
    message = problems({"hidden_size": 20}, {"tie_word_embeddings": True}, operator="isometric")
    assert message == [
        f"{H}.model.tie_word_embeddings = true is not supported by isometric; grow an untied model"
    ]


FACTORS = (widened(SOURCE, 24, 3, 36), widened(SOURCE, 32, 4, 25), DOUBLE)
SIZES = {
    "larger widths": (True, True, True),
    "larger widths, `hidden_size` by an integer factor": (False, True, True),
    "larger widths, each by an integer factor": (False, False, True),
    "all widths by a factor of 2": (False, False, True),
}
"""Documented sizes of width operators; True for each of FACTORS that they include."""


@pytest.mark.parametrize(
    "name",
    [name for name in OPERATORS if OPERATORS[name].wider and name not in ONE_FIELD],
)
def test_the_documented_sizes_are_those_that_are_accepted(name: str) -> None:
    found = [problems(sizes, operator=name) for sizes in FACTORS]
    # Operators that add zeros need another rms_norm_eps, which their message contains.
    accepted = tuple(all("rms_norm_eps" in problem for problem in some) for some in found)
    assert accepted == SIZES[OPERATORS[name].sizes.partition(";")[0]]
