"""A growth from files to files gives what the map says, in every layout, with moments and all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megagrow.checkpoint.manifest import read_manifest, verify_checkpoint, write_manifest
from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import OptimizerConfig
from megagrow.errors import InputError
from megagrow.growth.operators import growth_map
from megagrow.parallel.engine_config import parameter_groups
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.checkpoint.written import (
    RUN,
    differences,
    expected_shards,
    shards,
    write_checkpoint,
)
from tests.helpers.jobs import write_run
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of
from tests.helpers.runs import STEP_TOKENS, make_run
from tests.helpers.train.file_growths import BASE, GROWTHS, base, grow, model_file, overrides
from tools.docs.operators.dense_growth import grown

LAYOUTS = [
    ((0, 1, 1, "all"), (3, 3, 2, "matrices")),
    ((1, 2, 2, "matrices"), (2, 3, 1, "all")),
    ((2, 3, 1, "all"), (0, 2, 2, "all")),
    ((3, 4, 2, "all"), (1, 2, 1, "matrices")),
]
"""ZeRO stage, data parallel, tensor parallel and decay: before and after."""


SMALLEST = str(12 * 2**20 + 48 * 500)
"""A budget by which every matrix is made in several pieces."""


@pytest.mark.parametrize("name", GROWTHS)
def test_files_hold_what_the_map_says(tmp_path, name):
    changes, options = GROWTHS[name]
    source, target = base(), base(**changes)
    before, after = LAYOUTS[list(GROWTHS).index(name) % len(LAYOUTS)]
    state = random_state(parameter_plan(source, 1), seed=3)
    write_checkpoint(tmp_path / "in", source, layout_of(source, *before), state)
    growth = growth_map(source, target, GrowthConfig(**options), "7/stage-1")
    said = grow(
        source=tmp_path / "in",
        out=tmp_path / "out",
        to=model_file(tmp_path / "model.yaml", changes),
        overrides=overrides(options),
        zero_stage=after[0],
        dp=after[1],
        tp=after[2],
        weight_decay_on=after[3],
        memory=SMALLEST if name != "isometric" else "12.2MiB",
    )
    exact = "preserves the function" if growth.preserves_function else "changes the function"
    assert exact in said and "5, 640 tokens" in said
    tolerance = 1e-6 if name == "isometric" else 0.0
    if tolerance:
        state = {key: {k: t.double() for k, t in kinds.items()} for key, kinds in state.items()}
    layout = layout_of(target, *after)
    if name == "mup":  # its parameters are told apart by the factors on their learning rates
        optimizer = OptimizerConfig(lr=1.0, weight_decay_on=after[3])
        groups = parameter_groups(layout.plan, optimizer, growth.scales)
        layout = replace(layout, groups=tuple(group.names for group in groups))
    wanted = expected_shards(layout, grown(state, growth, target))
    assert differences(shards(tmp_path / "out"), wanted, tolerance) == []
    manifest = verify_checkpoint(tmp_path / "out")
    assert manifest.read_layout() == layout
    assert manifest.adam_step == (11 if growth.keeps_step else 0)
    assert manifest.run["counters"].items() >= RUN["counters"].items()
    assert (manifest.run["stage"], manifest.run["stage_tokens"]) == (1, 0)
    assert manifest.run["provenance"] == [list(growth.provenance)]
    assert manifest.run["operators"] == [GrowthConfig(**options).operator]
    assert manifest.environment["git_commit"] == "abc"
    assert manifest.environment["growth"]["stream"] == "7/stage-1"
    masked = "random" in name and "unmasked" not in name
    assert manifest.environment["growth"]["masks"] == (0.0 if masked else None)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"manifest.json", *manifest.files}
    assert not (tmp_path / "out.tmp").exists()


LATER_KEYS = ("skipped_tokens", "guard", "finished_tokens", "stage_starts")
"""Keys of the run state that earlier versions did not write."""


def conversion(tmp_path: Path, source: Path, **request: Any) -> dict[str, Any]:
    """A request by which nothing grows."""
    to = model_file(tmp_path / "same.yaml", read_manifest(source).model)
    return {"source": source, "to": to} | request


def test_a_model_that_does_not_grow_only_changes_its_layout(tmp_path):
    before, after = LAYOUTS[2]
    state = random_state(parameter_plan(base(), 1))
    path = write_checkpoint(tmp_path / "in", base(), layout_of(base(), *before), state)
    zero, dp, tp, decay = after
    layout = {"zero_stage": zero, "dp": dp, "tp": tp, "weight_decay_on": decay}
    grow(**conversion(tmp_path, path, out=tmp_path / "out", **layout))
    wanted = expected_shards(layout_of(base(), *after), state)
    assert differences(shards(tmp_path / "out"), wanted) == []
    old, new = read_manifest(path), read_manifest(tmp_path / "out")
    counters = new.run["counters"]
    assert counters.items() >= RUN["counters"].items()
    later = {name: new.run[name] for name in LATER_KEYS}
    assert new.run == RUN | {"counters": counters, "operators": []} | later
    assert later["skipped_tokens"] == 0 and later["guard"]["rewinds"] == 0
    assert later["finished_tokens"] == later["stage_starts"] == []
    assert (new.adam_step, new.environment) == (11, old.environment)


def test_a_model_behind_masks_grows_no_further_until_it_is_trained(tmp_path):
    state = random_state(parameter_plan(base(), 1))
    path = write_checkpoint(tmp_path / "in", base(), layout_of(base(), 1, 1, 1), state)
    deep = model_file(tmp_path / "deep.yaml", {"num_hidden_layers": 4})
    grow(source=path, out=tmp_path / "random", to=deep, operators=("random_depth",))
    deeper = model_file(tmp_path / "deeper.yaml", {"num_hidden_layers": 8})
    with pytest.raises(InputError, match="growth masks are still ramping"):
        grow(source=tmp_path / "random", out=tmp_path / "out", to=deeper)
    request = conversion(tmp_path, tmp_path / "random")
    with pytest.raises(InputError, match="growth masks are still ramping"):
        grow(out=tmp_path / "out", form="huggingface", **request)
    grow(out=tmp_path / "out", dp=2, **request)
    told = read_manifest(tmp_path / "out").environment["growth"]
    assert told["masks"] == 0.0


def under_deprecated_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return the dump of a run of two stages as earlier versions recorded it."""
    config["stage"] = config.pop("objective")
    growth = config["stages"][1]["growth"]
    growth["layers"] = growth.pop("layer_map")
    growth["literal"] = growth.pop("paper_exact")
    return config


@pytest.mark.parametrize("deprecated", [False, True])
@pytest.mark.parametrize(("step", "masked"), [(3, True), (4, False)])
def test_masks_of_a_run_are_known_from_its_position(tmp_path, step, masked, deprecated):
    growth = {"operator": "random_depth", "ramp_tokens": 4 * STEP_TOKENS}
    deep = {"model": BASE | {"num_hidden_layers": 4}, "growth": growth, "tokens": 640}
    run = make_run(tmp_path, [{"model": BASE, "tokens": 640}, deep])
    model = run.stages[1].model
    state = random_state(parameter_plan(model, 1))
    path = write_checkpoint(tmp_path / "in", model, layout_of(model, 1, 1, 1), state)
    manifest = read_manifest(path)
    config = run.model_dump(mode="json")
    environment = {"config": under_deprecated_names(config) if deprecated else config}
    position = RUN | {
        "stage": 1,
        "stage_tokens": step * STEP_TOKENS,
        "provenance": [[0, 1, -1, -1]],
    }
    write_manifest(path, replace(manifest, run=position, environment=environment))
    request = conversion(tmp_path, path, out=tmp_path / "out", form="huggingface")
    if masked:
        with pytest.raises(InputError, match="growth masks are still ramping"):
            grow(**request)
    else:
        grow(**request)
    assert (tmp_path / "out").exists() != masked


def test_a_hugging_face_model_can_begin_any_stage_of_a_run(tmp_path):
    state = random_state(parameter_plan(base(), 1))
    path = write_checkpoint(tmp_path / "in", base(), layout_of(base(), 1, 1, 1), state)
    grow(out=tmp_path / "theirs", form="huggingface", **conversion(tmp_path, path))
    shallow, deep = ({"model": BASE | {"num_hidden_layers": n}} for n in (1, 4))
    stages = [
        {"tokens": 640, **shallow},
        {"tokens": 640, "model": BASE, "growth": {}},
        {"tokens": 640, "growth": {"operator": "zero_depth"}, **deep},
    ]
    run = write_run(tmp_path / "run.yaml", make_run(tmp_path, stages))
    request = {"source": tmp_path / "theirs", "to": str(run), "form": "checkpoint"}
    grow(out=tmp_path / "out", stage=2, **request)
    found = read_manifest(tmp_path / "out").run
    assert (found["stage"], found["stage_tokens"], found["counters"]["tokens"]) == (2, 0, 0)
    assert found["provenance"] == [[], [0, 0, 1, 1]]
    assert found["operators"] == [[], ["zero_depth"]]
