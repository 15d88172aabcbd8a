"""Errors for invalid growths of a run; valid ones have none."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from megagrow.config.growth import OperatorName
from megagrow.config.schema import GrowthConfig, RunConfig
from megagrow.growth.operators import OPERATORS, growth_map
from megagrow.growth.validation import growth_problems, unused_keys
from tests.helpers.growth.cases import Sizes, widened
from tests.helpers.growth.events import DEPTH, DOUBLE, LISTED, SOURCE, B, H, layers, problems

ROOT = Path(__file__).resolve().parents[2]

RIGHT: list[tuple[Sizes, dict[str, Any]]] = [
    (layers(8), {}),
    (layers(4), {}),
    (layers(7), {"layer_map": "interpolate"}),
    (layers(3), {"layer_map": [3, 0, 0]}),
    (layers(6), {"layer_map": "12-34x2"}),
    (layers(9), {"operator": "zero_depth"}),
    (layers(6), {"operator": "zero_depth", "layer_map": [0, 1, 1, 2, 0, 3]}),
    (layers(5), {"operator": "random_depth"}),
    (layers(5), {"operator": "random_depth", "layer_map": [0, 1, -1, 2, 3]}),
    (layers(5), {"layer_map": [0, 1, 2, 3, -1]}),
    (DOUBLE | layers(8), {"operator": ["random_depth", "direct_width"], "ramp_tokens": 0}),
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


def ungrown(field: str, old: object, new: object, names: str, operator: str = "") -> str:
    kept = f"set {H}.model.{field} to {json.dumps(old)}"
    fix = f"set {H}.growth.operator to {operator}" if operator else kept
    return f"{H}.model changes {field} from {old} to {new}, which {names} cannot grow; {fix}"


def shrunk(changes: str) -> str:
    return (
        f"{H}.model reduces {changes}; growth cannot shrink a model, so use at least the sizes of "
        f"{B}"
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
            "combined with random ones, unless growth.ramp_tokens is 0"
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
    ({"hidden_size": 32}, {}, [ungrown("hidden_size", 16, 32, "direct_depth", "direct_width")]),
    (
        {"hidden_size": 20} | layers(8),
        {},
        [ungrown("hidden_size", 16, 20, "direct_depth", "[direct_depth, zero_width]")],
    ),
    (
        {"hidden_size": 32, "intermediate_size": 48} | layers(8),
        {"operator": "learn_depth"},
        [
            ungrown(
                "hidden_size from 16 to 32 and intermediate_size",
                *(24, 48, "learn_depth", "[learn_depth, learn_width]"),
            )
        ],
    ),
    (
        {"hidden_size": 32} | layers(6),
        {"operator": "random_width"},
        [ungrown("num_hidden_layers", 4, 6, "random_width", "[random_width, random_depth]")],
    ),
    ({"vocab_size": 65}, {}, [ungrown("vocab_size", 64, 65, "direct_depth", "vocabulary")]),
    ({"rope_theta": 5.0} | layers(8), {}, []),
    (
        {"tie_word_embeddings": True} | layers(8),
        {},
        [ungrown("tie_word_embeddings", False, True, "direct_depth")],
    ),
    (
        layers(8),
        {"operator": "lemon"},
        [ungrown("num_hidden_layers", 4, 8, "lemon", "direct_depth")],
    ),
    (
        DOUBLE | {"head_dim": 8},
        {"operator": ["zero_depth", "lemon"]},
        [ungrown("head_dim", 4, 8, "zero_depth with lemon")],
    ),
    (
        {"intermediate_size": 48},
        {"operator": "isometric"},
        [ungrown("intermediate_size", 24, 48, "isometric", "direct_width")],
    ),
    (
        {"hidden_size": 32},
        {"operator": "head_dim"},
        [ungrown("hidden_size", 16, 32, "head_dim", "direct_width")],
    ),
    (
        {"hidden_size": 8, "intermediate_size": 23},
        {"operator": "zero_width"},
        [shrunk("hidden_size from 16 to 8 and intermediate_size from 24 to 23")],
    ),
    ({"hidden_size": 8} | layers(8), {}, [shrunk("hidden_size from 16 to 8")]),
    ({"vocab_size": 60}, {"operator": "vocabulary"}, [shrunk("vocab_size from 64 to 60")]),
    *[
        (layers(3), {"operator": name}, [shrunk("num_hidden_layers from 4 to 3")])
        for name, operator in OPERATORS.items()
        if operator.deeper
    ],
    (layers(3), {"layer_map": "stack"}, [shrunk("num_hidden_layers from 4 to 3")]),
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
        "stages.2.model changes num_hidden_layers from 6 to 12, which lemon cannot grow; set "
        "stages.2.growth.operator to direct_depth",
    ]
    before = wrong.model_dump()
    growth_problems(wrong)
    assert wrong.model_dump() == before, "validation modifies nothing"


def test_a_missing_growth_is_for_the_checks_of_the_config() -> None:
    assert growth_problems(run((layers(8), None))) == []


SET = {
    "layer_map": [0, 1, 1, 2, 2, 3],
    "new_layer_init": "random",
    "copy_order": "tiled",
    "copy_split": "uneven",
    "paper_exact": True,
    "noise": 0.5,
}
"""Values of the keys that shape the map of a growth, other than their defaults."""

TARGETS: dict[str, Sizes] = {
    "isometric": {"hidden_size": 20},
    "head_dim": {"head_dim": 8},
    "vocabulary": {"vocab_size": 65},
}


def map_of(name: OperatorName, **options: Any) -> bytes:
    growth = GrowthConfig(operator=[name], **options)
    sizes = TARGETS.get(name, DOUBLE if OPERATORS[name].wider else layers(6))
    found = growth_map(SOURCE, SOURCE.model_copy(update=sizes), growth, "7/stage-1")
    return pickle.dumps((found.weights, found.moments, found.fills, found.fresh))


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_declares_the_keys_that_change_its_map(name: OperatorName) -> None:
    plain, operator = map_of(name), OPERATORS[name]
    changing = {key for key, value in SET.items() if map_of(name, **{key: value}) != plain}
    declared = set(operator.keys) & SET.keys()
    assert declared <= changing if operator.learned else declared == changing


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"operator": "solar", "layer_map": "stack"}, "layer_map is set, but solar does not use"),
        ({"operator": "net2net_width", "copy_split": "uneven"}, "copy_split"),
        ({"operator": "net2net_width", "paper_exact": True}, "paper_exact"),
        ({"operator": "direct_depth", "noise": 0.1}, "noise is set, but direct_depth does not"),
        ({"operator": "midas", "new_layer_init": "random"}, "new_layer_init"),
        ({"operator": "learn_depth", "paper_exact": True}, "paper_exact"),
        ({"operator": "direct_depth", "ramp_tokens": 100}, "use one of random_depth, random_width"),
        ({"operator": "direct_depth", "learn": {"steps": 5}}, "one of learn_depth, learn_width"),
        ({"operator": "direct_depth", "second_moment_batches": 5}, "is asymmetric; remove it"),
        ({"probe": {"operators": ["midas", "solar"]}, "copy_order": "tiled"}, "midas and solar"),
    ],
)
def test_a_key_that_no_operator_uses_is_refused(options: dict[str, Any], problem: str) -> None:
    (found,) = unused_keys(GrowthConfig(**options), "stages.1.growth")
    assert found.startswith("stages.1.growth.") and problem in found


@pytest.mark.parametrize(
    "options",
    [
        {"operator": ["direct_depth", "lemon"], "noise": 0.1, "layer_map": "stack"},
        {"probe": {"operators": ["midas", "zero_depth"]}, "new_layer_init": "random"},
        {"operator": "solar", "copy_order": "interleaved", "second_moment_batches": 8},
        {"optimizer_state": "estimate_second_moment", "second_moment_batches": 5},
    ],
)
def test_a_key_that_one_operator_uses_is_accepted(options: dict[str, Any]) -> None:
    assert [*unused_keys(GrowthConfig(**options), "stages.1.growth")] == []


def test_the_guide_lists_the_operators_of_each_key() -> None:
    guide = (ROOT / "docs/guides/growth.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (`\w+`(?:, `\w+`)*) \|$", guide, re.MULTILINE)
    listed = {
        key: set(re.findall(r"`(\w+)`", names))
        for keys, names in rows
        for key in re.findall(r"`(\w+)`", keys)
    }
    used = {key: {n for n, op in OPERATORS.items() if key in op.keys} for key in listed}
    assert listed == used and listed.keys() >= {*SET, "ramp_tokens", "learn"}
