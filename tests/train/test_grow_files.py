"""A growth from files to files gives what the map says, in every layout, with moments and all."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from megagrow.checkpoint.manifest import read_manifest
from megagrow.config.growth import GrowthConfig
from megagrow.growth.operators import growth_map
from megagrow.parallel.plan import parameter_plan
from megagrow.train.grow_files import grow_files
from megagrow.train.grow_request import Request
from tests.checkpoint.written import RUN, differences, expected_shards, shards, write_checkpoint
from tests.growth.whole import grown
from tests.reshard.definition import random_state
from tests.reshard.models import layout_of
from tests.train.file_growths import BASE, GROWTHS, base

LAYOUTS = [
    ((0, 1, 1, "all"), (3, 3, 2, "matrices")),
    ((1, 2, 2, "matrices"), (2, 3, 1, "all")),
    ((2, 3, 1, "all"), (0, 2, 2, "all")),
    ((3, 4, 2, "all"), (1, 2, 1, "matrices")),
]
"""ZeRO stage, data parallel, tensor parallel and decay: before and after."""


SMALLEST = str(12 * 2**20 + 48 * 500)
"""A budget by which every matrix is made in several pieces."""


def model_file(path: Path, changes: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(BASE | changes))
    return str(path)


def overrides(options: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"growth.{key}={json.dumps(value)}" for key, value in options.items())


def grow(**request: Any) -> str:
    """Carries out a request; returns what was said."""
    said = io.StringIO()
    grow_files(Request(**request), Console(file=said, width=300))
    return said.getvalue()


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
    exact = "keeps the function" if growth.preserves_function else "changes the function"
    assert exact in said and "5, 640 tokens" in said
    tolerance = 1e-6 if name == "isometric" else 0.0
    if tolerance:
        state = {key: {k: t.double() for k, t in kinds.items()} for key, kinds in state.items()}
    wanted = expected_shards(layout_of(target, *after), grown(state, growth, target))
    assert differences(shards(tmp_path / "out"), wanted, tolerance) == []
    manifest = read_manifest(tmp_path / "out")
    assert manifest.read_layout() == layout_of(target, *after)
    assert manifest.adam_step == (11 if growth.keeps_step else 0)
    assert manifest.run["counters"].items() >= RUN["counters"].items()
    assert (manifest.run["stage"], manifest.run["stage_step"]) == (1, 0)
    assert manifest.run["provenance"] == [list(growth.provenance)]
    assert manifest.environment["git_commit"] == "abc"
    assert manifest.environment["growth"]["stream"] == "7/stage-1"
    assert manifest.environment["growth"]["masks"] == (0.0 if "random" in name else None)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"manifest.json", *manifest.files}
    assert not (tmp_path / "out.tmp").exists()
