"""A manifest is read as it was written, and gives back the layout of the files."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.manifest import read_manifest, write_manifest
from megagrow.errors import InputError
from tests.checkpoint.saving import MODEL, manifest_of
from tests.reshard.models import layout_of, layouts, models


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


def test_files_are_checked_by_their_sizes(tmp_path):
    layout = layout_of(MODEL, 0, 1, 1)
    write_manifest(tmp_path, manifest_of(layout)({"a": 3}))
    (tmp_path / "a").write_bytes(b"123")
    assert read_manifest(tmp_path).files == {"a": 3}
    (tmp_path / "a").write_bytes(b"1234")
    with pytest.raises(InputError, match="4 bytes instead of 3"):
        read_manifest(tmp_path)
