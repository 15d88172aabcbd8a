"""Errors for depths that an operator does not support."""

from typing import Any

import pytest

from megagrow.growth.operators import OPERATORS
from tests.helpers.growth.cases import Sizes
from tests.helpers.growth.events import DEPTH, LISTED, B, layers, problems

PAPERS = (
    "123456x4, 12-3456x5-56, 12-345x7-6, 123-456x7, 1234-56x10, 12-34x10-56, 1-234x7-56, 123x7-456"
)
FIX = f"use a multiple or set {LISTED}"
ORDERED = (
    f"{LISTED} omits or reorders source layers, which zero_depth must keep; list all of them, with "
    "first occurrences in order"
)
RANDOM_ORDERED = ORDERED.replace("zero_depth", "random_depth")

WRONG: list[tuple[Sizes, dict[str, Any], list[str]]] = [
    (
        layers(6),
        {},
        [f"{DEPTH} = 6 is not divisible by {B}.num_hidden_layers = 4; {FIX}"],
    ),
    (
        layers(8),
        {"layer_map": "sandwich"},
        [
            f"{LISTED} = 'sandwich' is not a list, `stack`, `interpolate`, or a partial stack such "
            f"as the paper's {PAPERS}"
        ],
    ),
    (
        layers(8),
        {"layer_map": []},
        [
            f"{LISTED} = [] is not a list, `stack`, `interpolate`, or a partial stack such as "
            f"the paper's {PAPERS}"
        ],
    ),
    (
        layers(8),
        {"layer_map": [0, 5, 4]},
        [
            f"{LISTED} has 3 entries, but {DEPTH} = 8; list 8 layers",
            f"{LISTED} contains layer 4, but {B} has layers 0 to 3",
            f"{LISTED} contains layer 5, but {B} has layers 0 to 3",
        ],
    ),
    (
        layers(5),
        {"layer_map": "1234-5"},
        [f"{LISTED} contains layer 4, but {B} has layers 0 to 3"],
    ),
    (layers(5), {"operator": "zero_depth", "layer_map": [0, 1, 2, 2, 1]}, [ORDERED]),
    (layers(5), {"operator": "zero_depth", "layer_map": [1, 0, 2, 3, 3]}, [ORDERED]),
    (
        layers(4),
        {"operator": "zero_depth", "layer_map": [0, 1, 2]},
        [f"{LISTED} has 3 entries, but {DEPTH} = 4; list 4 layers"],
    ),
    *[
        (
            layers(n),
            {"operator": "solar"},
            [f"{DEPTH} = {n}: solar needs an even number from 4 to 8"],
        )
        for n in (5, 10)
    ],
    *[
        (
            layers(n),
            {"operator": "llama_pro"},
            [
                f"{DEPTH} = {n}: llama_pro adds {n - 4} layers, which must be a divisor of "
                f"{B}.num_hidden_layers = 4"
            ],
        )
        for n in (4, 7, 12)
    ],
    *[
        (layers(n), {"operator": "mslt"}, [f"{DEPTH} = {n}: mslt needs a number from 5 to 8"])
        for n in (4, 9)
    ],
    *[
        (
            layers(n),
            {"operator": "midas"},
            [
                f"{DEPTH} = {n}: midas adds one block, whose size must divide the 4 source "
                "layers into 1 or more blocks"
            ],
        )
        for n in (4, 7, 9)
    ],
    (
        layers(5),
        {"operator": "learn_depth", "layer_map": [0, 1, 2, 3, -1]},
        [
            f"{LISTED} contains -1, but learn_depth mixes source layers in every layer; list "
            "source layers"
        ],
    ),
    (layers(5), {"operator": "random_depth", "layer_map": [1, 0, 2, 3, -1]}, [RANDOM_ORDERED]),
    (
        layers(8),
        {"operator": "lidas"},
        [
            f"{DEPTH} = 8: lidas adds one block, whose size must divide the 4 source layers into "
            "2 or more blocks"
        ],
    ),
]


NO_LAYERS: list[tuple[str, Any, str]] = [
    *(
        (name, None, f"{B}.num_hidden_layers = 0: {name} copies layers, and the source has none; ")
        for name, operator in OPERATORS.items()
        if operator.deeper and name != "random_depth"
    ),
    ("random_depth", [-1, 0], f"{LISTED} contains layer 0, but {B} has no layers"),
]


@pytest.mark.parametrize(("name", "layer_map", "message"), NO_LAYERS, ids=str)
def test_from_no_layers_only_new_ones_grow(name: str, layer_map: Any, message: str) -> None:
    (found,) = problems(layers(2), layers(0), operator=name, layer_map=layer_map)
    assert found.startswith(message)
    assert problems(layers(2), layers(0), operator="random_depth") == []


@pytest.mark.parametrize(("target", "options", "message"), WRONG, ids=str)
def test_what_is_wrong(target: Sizes, options: dict[str, Any], message: list[str]) -> None:
    assert problems(target, **options) == message


SIZES = {
    "layers by an integer factor; any number with `layer_map`": lambda n: n % 4 == 0,
    "more layers": lambda n: True,
    "an even number of layers, at most twice as many": lambda n: n % 2 == 0 and n <= 8,
    "n more layers, where n divides the number of layers": lambda n: n - 4 in (1, 2, 4),
    "n more layers, where n divides the number of layers at least twice": (
        lambda n: n - 4 in (1, 2)
    ),
    "more layers, at most twice as many": lambda n: n <= 8,
}
"""Documented sizes of depth operators, as a condition on the target for a source of 4 layers."""


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if operator.deeper])
def test_the_documented_sizes_are_those_that_are_accepted(name: str) -> None:
    accepted = [n for n in range(5, 14) if not problems(layers(n), operator=name)]
    assert accepted == [n for n in range(5, 14) if SIZES[OPERATORS[name].sizes](n)]
