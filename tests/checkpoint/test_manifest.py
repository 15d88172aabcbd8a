"""A manifest is read as it was written, and gives back the layout of the files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_hexdigest

from megagrow.checkpoint.manifest import (
    describe_layout,
    read_manifest,
    verify_checkpoint,
    write_manifest,
)
from megagrow.common.checksums import FileRecord
from megagrow.errors import CheckpointError, InputError
from tests.helpers.checkpoint.saving import MODEL, manifest_of
from tests.helpers.checkpoint.written import record_of
from tests.helpers.reshard.models import layout_of, layouts, models

SHARD = "rank-00000.safetensors"
NAMES = [
    f"../{SHARD}",
    f"/tmp/{SHARD}",
    f"x/{SHARD}",
    f"{SHARD}\n",
    SHARD.upper(),
    "rank-0.safetensors",
]
NAMES += ["..", "", "manifest.json"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), models())
def test_a_manifest_and_its_layout_survive_the_disk(tmp_path, data, config):
    layout = data.draw(layouts(config))
    manifest = manifest_of(layout, model=config)({})
    write_manifest(tmp_path, manifest)
    found = read_manifest(tmp_path)
    assert found.read_layout() == layout
    assert (found.model, found.adam_step, found.run, found.environment) == (
        manifest.model,
        manifest.adam_step,
        manifest.run,
        manifest.environment,
    )


def written(folder: Path, **changes: Any) -> Path:
    """manifest.json of a folder with one file of three bytes."""
    (folder / SHARD).write_bytes(b"123")
    files = {SHARD: record_of(folder / SHARD)}
    write_manifest(folder, replace(manifest_of(layout_of(MODEL, 0, 1, 1))(files), **changes))
    return folder / "manifest.json"


def test_files_are_checked_by_their_sizes_and_by_every_byte(tmp_path):
    written(tmp_path)
    assert verify_checkpoint(tmp_path).files == {SHARD: FileRecord(3, xxh3_64_hexdigest(b"123"))}
    (tmp_path / SHARD).write_bytes(b"1234")
    with pytest.raises(InputError, match="4 bytes instead of 3"):
        read_manifest(tmp_path)
    (tmp_path / SHARD).write_bytes(b"124")
    read_manifest(tmp_path)
    with pytest.raises(InputError, match=f"{SHARD}: damaged, its checksum is .* instead of "):
        verify_checkpoint(tmp_path)
    (tmp_path / SHARD).unlink()
    with pytest.raises(InputError, match=f"{SHARD} is missing"):
        verify_checkpoint(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_files_outside_of_the_checkpoint_are_not_touched(tmp_path, name):
    make = manifest_of(layout_of(MODEL, 0, 1, 1))
    write_manifest(tmp_path, make({name: FileRecord(0, xxh3_64_hexdigest(b""))}))
    with pytest.raises(InputError, match="which is not a rank's file") as error:
        read_manifest(tmp_path)
    assert repr(name) in str(error.value) and "\n" not in str(error.value)


def test_a_bit_that_flips_in_the_manifest_is_found(tmp_path):
    path = written(tmp_path)
    good = path.read_bytes()
    at = good.index(b'"adam_step": 11') + len('"adam_step": 1')
    path.write_bytes(good[:at] + b"3" + good[at + 1 :])
    with pytest.raises(InputError, match=r"manifest.json: damaged \(checksum mismatch"):
        read_manifest(tmp_path)


LAYOUTS = {
    "no stage": {"zero_stage": 4},
    "no ranks": {"dp": 0},
    "half a rank": {"tp": 1.0},
    "a flag": {"dp": True},
    "parameters missing": {"groups": [["model.norm.weight"]]},
    "no groups": {"groups": 3},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_is_none_is_refused(tmp_path, name):
    layout = describe_layout(layout_of(MODEL, 0, 1, 1)) | LAYOUTS[name]
    written(tmp_path, layout=layout)
    with pytest.raises(InputError, match=r"manifest.json: damaged \("):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"adam_step"', '"adam_step": 1, "adam_step"'),
        ('"protected": null', '"protected": NaN'),
        ('"protected": null', '"protected": 1e999'),
    ],
)
def test_a_manifest_that_is_not_strict_json_is_rejected(tmp_path, old, new):
    path = written(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(tmp_path)
