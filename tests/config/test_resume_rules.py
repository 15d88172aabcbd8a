"""Every key has a class for resumes, and differences of two configurations are found by key."""

from typing import Any

import pytest

from megagrow.config.differences import ABSENT, config_changes
from megagrow.config.resume_rules import EFFECTS, Effect, check_allowed, effect_of
from megagrow.config.schema import RunConfig
from megagrow.config.sections import Section
from megagrow.errors import ConfigError
from tests.helpers.config_keys import sections_in

CONTENTS = {"data.validation.NAME.N.contents", "data.tokenizer_contents"}
CONTENTS |= {"stages.N.data.train.N.contents"}
"""Compared in addition to the keys of a run file."""
UNNAMED = {f"data.validation.N{key}" for key in ("", ".path", ".weight", ".contents")}
"""Validation corpora that are given as a list, which is a set without a name."""
CLASSIFIED = [key for keys in EFFECTS.values() for key in keys]


def comparable(section: type[Section], path: str = "") -> set[str]:
    """Return the paths at which two dumps of a section can differ."""
    found: set[str] = set()
    for name, field in section.model_fields.items():
        if field.exclude:
            continue
        place = f"{path}{name}"
        sections = list(sections_in(field.annotation))
        for kind, items in sections:
            steps = items.split(".")[1:]
            found |= {".".join([place, *steps[:n]]) for n in range(1, len(steps) + 1)}
            found |= comparable(kind, f"{place}{items}.")
        if not sections or field.default is None:
            found.add(place)
    return found


def test_every_key_is_classified_once() -> None:
    assert len(CLASSIFIED) == len(set(CLASSIFIED)) > 100
    assert set(CLASSIFIED) == comparable(RunConfig) | CONTENTS | UNNAMED


@pytest.mark.parametrize(
    ("key", "stage", "effect"),
    [
        ("checkpoint.interval", 0, Effect.FROM_NOW_ON),
        ("checkpoint.background", 0, Effect.NONE),
        ("stages.1.parallel.zero_stage", 1, Effect.ROUNDING),
        ("stages.0.parallel.zero_stage", 1, Effect.ROUNDING),
        ("stages.1.optimizer.lr", 1, Effect.FROM_NOW_ON),
        ("stages.0.optimizer.lr", 1, Effect.CONTRADICTION),
        ("stages.12.growth.operator", 3, Effect.FROM_NOW_ON),
        ("stages.1.growth.noise", 1, Effect.CONTRADICTION),
        ("stages.0.growth.operator", 1, Effect.FIXED),
        ("stages.1.model.hidden_size", 0, Effect.FROM_NOW_ON),
        ("stages.1.model.hidden_size", 1, Effect.FIXED),
        ("stages.1.data.train.10.weight", 1, Effect.CONTRADICTION),
        ("stages.1.data.train.10.weight", 0, Effect.FROM_NOW_ON),
        ("seed", 5, Effect.CONTRADICTION),
    ],
)
def test_the_effect_depends_on_the_stage(key: str, stage: int, effect: Effect) -> None:
    assert effect_of(key, stage) is effect


def test_a_key_without_a_class_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"optimizer\.momentum"):
        config_changes({"optimizer": {"momentum": 0}}, {"optimizer": {"momentum": 1}}, 0)


def test_differences_are_listed_by_key() -> None:
    old: dict[str, Any] = {
        "seed": 1,
        "samples": None,
        "data": {"validation": []},
        "stages": [
            {"tokens": 5, "data": {"train": [{"path": "a"}]}, "optimizer": {"betas": [0.9, 0.95]}},
            {"tokens": 1},
        ],
    }
    new = {
        "seed": 1,
        "samples": {"prompts": ["A"]},
        "data": {"validation": []},
        "stages": [
            {
                "tokens": 5,
                "data": {"train": [{"path": "b"}, {"path": "c"}]},
                "optimizer": {"betas": [0.9, 0.99]},
            }
        ],
    }
    found = {change.key: (change.old, change.new) for change in config_changes(old, new, 0)}
    assert found == {
        "samples": (None, {"prompts": ["A"]}),
        "stages.0.data.train.0.path": ("a", "b"),
        "stages.0.data.train.1": (ABSENT, {"path": "c"}),
        "stages.0.optimizer.betas": ([0.9, 0.95], [0.9, 0.99]),
        "stages.1": ({"tokens": 1}, ABSENT),
    }
    assert config_changes(old, old, 0) == []


def test_only_keys_and_sections_can_be_allowed() -> None:
    check_allowed(["all", "seed", "stages.1.optimizer", "stages.0.optimizer.lr", "data.train.0"])
    for key, hint in (("sed", "; did you mean 'seed'?"), ("nonsense.key", ""), ("seed.x", "")):
        with pytest.raises(ConfigError, match=rf"--allow-change {key}: no such key") as caught:
            check_allowed([key])
        assert hint in str(caught.value)


def test_measurements_of_a_finished_stage_contradict_nothing() -> None:
    for key in ("validation.tokens", "evaluation", "evaluation.tasks"):
        found = [effect_of(f"stages.{index}.{key}", stage=1) for index in range(3)]
        assert found == [Effect.NONE, Effect.FROM_NOW_ON, Effect.FROM_NOW_ON], key
