"""Errors for invalid growths of a run; valid ones have none."""

from typing import Any

import pytest

from megagrow.config.schema import RunConfig
from megagrow.growth.validation import growth_problems
from tests.helpers.growth.cases import Sizes, widened
from tests.helpers.growth.events import DEPTH, DOUBLE, LISTED, SOURCE, B, H, layers, problems

RIGHT: list[tuple[Sizes, dict[str, Any]]] = [
    (layers(8), {}),
    (layers(4), {}),
    (layers(7), {"layer_map": "interpolate"}),
    (layers(3), {"layer_map": [3, 0, 0]}),
    (layers(6), {"layer_map": "12-34x2"}),
    (layers(9), {"operator": "zero_depth"}),
    (layers(6), {"operator": "zero_depth", "layer_map": [0, 1, 1, 2, 0, 3]}),
    (layers(5), {"operator": "random_depth"}),
    (layers(6), {"operator": "solar"}),
    (layers(6), {"operator": "llama_pro"}),
    (layers(7), {"operator": "mslt"}),
    (layers(8), {"operator": "midas"}),
    (layers(6), {"operator": "lidas"}),
    (DOUBLE, {"operator": "direct_width"}),
    (widened(SOURCE, 48, 5, 25), {"operator": "direct_width"}),
    (widened(SOURCE, 17, 2, 24), {"operator": "direct_width", "paper_exact": True}),
    (DOUBLE, {"operator": "mup_copy"}),
    (DOUBLE, {"operator": "staged_width"}),
    (DOUBLE | layers(8), {"operator": ["direct_depth", "hypercloning"]}),
    ({"hidden_size": 20, "rms_norm_eps": 8e-3}, {"operator": "zero_width"}),
    ({"hidden_size": 20}, {"operator": "zero_width", "paper_exact": True}),
    ({"hidden_size": 36, "rms_norm_eps": 1e-2 * 32 / 36}, {"operator": "lemon"}),
    ({"hidden_size": 20}, {"operator": "sparkling"}),
    ({"hidden_size": 20, "rms_norm_eps": 8e-3}, {"operator": "isometric"}),
    ({"hidden_size": 20}, {"operator": "random_width"}),
    (DOUBLE | layers(5), {"operator": ["random_width", "random_depth"]}),
    (DOUBLE | layers(8), {"operator": ["learn_width", "learn_depth"]}),
    ({"head_dim": 8}, {"operator": "head_dim"}),
    ({"vocab_size": 65}, {"operator": "vocabulary"}),
    ({"initializer_range": 0.5, "max_position_embeddings": 4096}, {"operator": "direct_depth"}),
    (DOUBLE | layers(8), {"operator": ["zero_depth", "mup_copy"], "exact_continuation": False}),
]


@pytest.mark.parametrize(("target", "options"), RIGHT, ids=str)
def test_what_is_right(target: Sizes, options: dict[str, Any]) -> None:
    assert problems(target, **options) == []


def kept(field: str, new: object, old: object, names: str) -> str:
    return (
        f"{H}.model.{field} = {new} differs from {B}.{field} = {old}, which {names} cannot grow; "
        "make them equal"
    )


WRONG: list[tuple[Sizes, dict[str, Any], list[str]]] = [
    # Operators that cannot be combined.
    (
        layers(8),
        {"operator": ["direct_depth", "zero_depth"]},
        [f"{H}.growth.operator has several depth operators; keep one"],
    ),
    (
        DOUBLE,
        {"operator": ["lemon", "zero_depth", "direct_width"]},
        [f"{H}.growth.operator has several width operators; keep one"],
    ),
    (
        DOUBLE,
        {"operator": ["random_depth", "direct_width"]},
        [
            f"{H}.growth.operator: random_depth with direct_width: random operators can only be "
            "combined with random ones"
        ],
    ),
    (
        DOUBLE,
        {"operator": ["learn_depth", "direct_width"]},
        [
            f"{H}.growth.operator: learn_depth with direct_width: learned operators can only be "
            "combined with learned ones"
        ],
    ),
    (
        {"hidden_size": 20},
        {"operator": "isometric", "mixing_noise": 0.2},
        [f"{H}.growth.mixing_noise is not supported by isometric; remove it"],
    ),
    # Sizes that an operator does not grow, or that shrink.
    ({"hidden_size": 32}, {}, [kept("hidden_size", 32, 16, "direct_depth")]),
    ({"vocab_size": 65}, {}, [kept("vocab_size", 65, 64, "direct_depth")]),
    ({"rope_theta": 5.0}, {}, [kept("rope_theta", 5.0, 10000.0, "direct_depth")]),
    (
        {"tie_word_embeddings": True} | layers(8),
        {},
        [kept("tie_word_embeddings", True, False, "direct_depth")],
    ),
    (layers(8), {"operator": "lemon"}, [kept("num_hidden_layers", 8, 4, "lemon")]),
    (
        DOUBLE | {"head_dim": 8},
        {"operator": ["zero_depth", "lemon"]},
        [kept("head_dim", 8, 4, "zero_depth with lemon")],
    ),
    (
        {"intermediate_size": 48},
        {"operator": "isometric"},
        [kept("intermediate_size", 48, 24, "isometric")],
    ),
    ({"hidden_size": 32}, {"operator": "head_dim"}, [kept("hidden_size", 32, 16, "head_dim")]),
    (
        {"hidden_size": 8, "intermediate_size": 23},
        {"operator": "zero_width"},
        [
            f"{H}.model.hidden_size = 8 is below {B}.hidden_size = 16; use at least that",
            f"{H}.model.intermediate_size = 23 is below {B}.intermediate_size = 24; use at least "
            "that",
        ],
    ),
    (
        {"vocab_size": 60},
        {"operator": "vocabulary"},
        [f"{H}.model.vocab_size = 60 is below {B}.vocab_size = 64; use at least that"],
    ),
]


@pytest.mark.parametrize(("target", "options", "message"), WRONG, ids=str)
def test_what_is_wrong(target: Sizes, options: dict[str, Any], message: list[str]) -> None:
    assert problems(target, **options) == message


def run(*changes: tuple[Sizes, dict[str, Any] | None]) -> RunConfig:
    """A run with a first stage, and one more stage per change."""
    stages = []
    for sizes, growth in ((({}, None)), *changes):
        stages.append(
            {
                "model": SOURCE.model_dump() | sizes,
                "tokens": 64,
                "batch": {"global_batch_size": 1, "micro_batch_size": 1},
                "optimizer": {"lr": 1e-3},
                "growth": growth,
            }
        )
    data = {"train": [{"path": "x"}], "sequence_length": 64}
    return RunConfig.model_validate(
        {"name": "t", "output_dir": "o", "data": data, "stages": stages}
    )


def test_all_growths_of_a_run_are_looked_at() -> None:
    assert growth_problems(run()) == []
    assert growth_problems(run((layers(8), {}), (layers(16), {}))) == []
    wrong = run((layers(6), {}), (layers(12), {"operator": "lemon"}))
    assert growth_problems(wrong) == [
        f"{DEPTH} = 6 is not divisible by {B}.num_hidden_layers = 4; use a multiple or "
        f"set {LISTED}",
        "stages.2.model.num_hidden_layers = 12 differs from stages.1.model.num_hidden_layers = 6, "
        "which lemon cannot grow; make them equal",
    ]
    before = wrong.model_dump()
    growth_problems(wrong)
    assert wrong.model_dump() == before, "validation modifies nothing"


def test_a_missing_growth_is_for_the_checks_of_the_config() -> None:
    assert growth_problems(run((layers(8), None))) == []
