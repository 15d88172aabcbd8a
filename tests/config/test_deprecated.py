"""Deprecated keys and values are accepted in run files, overrides and recorded configurations."""

import logging
from typing import Any

import pytest

from megagrow.config import deprecated
from megagrow.config.growth import GrowthConfig
from megagrow.config.load import recorded_run, to_yaml
from megagrow.config.schema import RunConfig
from tests.config.conftest import ONE_STAGE, SECOND_STAGE

GROWTH = [
    ("literal", "true", "paper_exact", True),
    ("block", "random", "new_layer_init", "random"),
    ("order", "tiled", "copy_order", "tiled"),
    ("split", "uneven", "copy_split", "uneven"),
    ("layers", "[0,0,0,0,1,1,1,1]", "layer_map", [0, 0, 0, 0, 1, 1, 1, 1]),
    ("probe_batches", "3", "second_moment_batches", 3),
    ("optimizer_state", "keep_v", "optimizer_state", "keep_second_moment"),
    ("optimizer_state", "probe_v", "optimizer_state", "estimate_second_moment"),
]
"""Old key, its text in YAML, current key, value."""

SFT = "reset_position_ids: true, reset_attention_mask: true, "


@pytest.fixture(autouse=True)
def warnings_again() -> None:
    deprecated._warn.cache_clear()


def growth_of(run: RunConfig) -> GrowthConfig:
    growth = run.stages[1].growth
    assert growth is not None
    return growth


def two_stages(growth: str) -> str:
    return ONE_STAGE + SECOND_STAGE.replace("growth: {}", f"growth: {growth}")


@pytest.mark.parametrize(("old", "text", "new", "value"), GROWTH)
def test_a_run_file(load, caplog, old: str, text: str, new: str, value: Any) -> None:
    run = load(text=two_stages(f"{{{old}: {text}}}"))
    assert getattr(growth_of(run), new) == value
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("megagrow.config", logging.WARNING)
    names = f"growth.{old}", f"growth.{new}"
    if old == new:
        names = f"growth.{old}: {text}", f"growth.{old}: {value}"
    assert record.getMessage() == f"config: {names[0]} is deprecated; use {names[1]}"


@pytest.mark.parametrize(("old", "text", "new", "value"), GROWTH)
@pytest.mark.parametrize("form", ["stages.1.growth.{}={}", "stages.1.growth={{{}: {}}}"])
def test_an_override(load_two, caplog, form: str, old, text, new, value: Any) -> None:
    run = load_two(form.format(old, text))
    assert getattr(growth_of(run), new) == value
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("old", "text", "new", "value"), GROWTH)
def test_a_recorded_configuration(load_two, caplog, old, text, new, value: Any) -> None:
    run = load_two(f"stages.1.growth.{new}={value}")
    dump = run.model_dump(mode="json")
    growth = dump["stages"][1]["growth"]
    del growth[new]
    growth[old] = text if old == new else value
    assert recorded_run(dump) == run
    assert caplog.records == []


def test_a_nested_key(load, load_two) -> None:
    written = load(text=two_stages("{lr_schedule: continue, new_entries: {peak: 2}}"))
    schedule = "stages.1.growth.lr_schedule=continue"
    assert load_two(schedule, "stages.1.growth.new_entries.peak=2") == written
    assert load_two(schedule, "stages.1.growth.new_entries={peak: 2}") == written
    new_entries = growth_of(written).new_entries
    assert new_entries is not None and new_entries.peak_factor == 2
    dump = written.model_dump(mode="json")
    own = dump["stages"][1]["growth"]["new_entries"]
    own["peak"] = own.pop("peak_factor")
    assert recorded_run(dump) == written


def test_the_objective(load, caplog) -> None:
    text = ONE_STAGE.replace("data: {", "data: {" + SFT)
    written = load(text=text + "stage: sft\n")
    assert written.objective == "sft"
    assert load("stage=sft", text=text) == written
    dump = written.model_dump(mode="json")
    dump["stage"] = dump.pop("objective")
    assert recorded_run(dump) == written
    assert [r.getMessage() for r in caplog.records] == [
        "config: stage is deprecated; use objective"
    ]


def test_an_override_replaces_the_value_under_either_name(load) -> None:
    for old, new in (("layers", "layer_map"), ("layer_map", "layers")):
        run = load(f"stages.1.growth.{new}=interpolate", text=two_stages(f"{{{old}: stack}}"))
        assert growth_of(run).layer_map == "interpolate"


def test_a_file_overrides_its_base_under_either_name(load, write_part) -> None:
    text = ONE_STAGE.replace("data: {", "data: {" + SFT)
    write_part("old", text + "stage: sft\n")
    assert load(text="base: old\nobjective: pretrain\n").objective == "pretrain"


def test_current_names_are_written(load) -> None:
    text = to_yaml(load(text=two_stages("{layers: stack, optimizer_state: keep_v}")))
    assert "layer_map: stack" in text and "optimizer_state: keep_second_moment" in text
    assert "keep_v" not in text and " layers:" not in text


@pytest.mark.parametrize(
    ("growth", "key", "names"),
    [
        (f"{{{old}: {text}, {new}: {text}}}", "", (old, new))
        for old, text, new, _ in GROWTH
        if old != new
    ]
    + [
        ("{new_entries: {peak: 1, peak_factor: 1}}", "new_entries.", ("peak", "peak_factor")),
        ("{new_entries: {peak_factor: 1, peak: 1}}", "new_entries.", ("peak", "peak_factor")),
    ],
)
def test_both_names_are_refused(refusal, growth: str, key: str, names: tuple[str, str]) -> None:
    old, new = (f"stages.1.growth.{key}{name}" for name in names)
    same = f"'{old}' and '{new}' are the same key; remove the deprecated '{old}'"
    assert refusal(text=two_stages(growth)) == f"run.yaml: {same}"
    override = f"stages.1.growth={growth}"
    assert refusal([override], text=two_stages("{}")) == f"--set {override}: {same}"


def test_both_names_of_the_objective_are_refused(refusal) -> None:
    text = ONE_STAGE + "stage: sft\nobjective: sft\n"
    assert refusal(text=text) == (
        "run.yaml: 'stage' and 'objective' are the same key; remove the deprecated 'stage'"
    )


def test_other_keys_of_the_same_names_are_kept(refusal) -> None:
    assert refusal(["stages.0.layers=1"], text=two_stages("{}")).startswith(
        "--set stages.0.layers=1: unknown key 'stages.0.layers'"
    )
