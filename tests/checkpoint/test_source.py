"""A source gives any rectangle of any tensor, whatever the layout of its files."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megagrow.checkpoint import manifest as manifest_module
from megagrow.checkpoint import source as module
from megagrow.checkpoint.discovery import shard_name
from megagrow.checkpoint.manifest import parse_manifest, write_manifest
from megagrow.checkpoint.source import open_checkpoint
from megagrow.checkpoint.tensor_file import read_header
from megagrow.errors import InputError
from megagrow.formats.open_source import open_found, open_source
from megagrow.parallel.sharding import ADAMW_KINDS, parameter_plan
from megagrow.reshard.fill import fill_read
from megagrow.reshard.layout import Block
from tests.helpers.checkpoint.saving import MODEL
from tests.helpers.checkpoint.written import RUN, record_of, write_checkpoint
from tests.helpers.logs import captured_logs
from tests.helpers.reshard.definition import empty_storage, random_state, same, storage_of
from tests.helpers.reshard.models import layout_of, layouts, models

LAYOUT = layout_of(MODEL, 1, 2, 1)


def part(draw: st.DrawFn, size: int) -> range:
    first = draw(st.integers(0, size - 1))
    return range(first, draw(st.integers(first + 1, size)))


@settings(deadline=None, max_examples=15)
@given(st.data(), models())
def test_every_rectangle_is_that_of_the_whole_tensor(data, model):
    layout = data.draw(layouts(model))
    state = random_state(parameter_plan(model, 1))
    with tempfile.TemporaryDirectory() as folder:
        source = open_checkpoint(write_checkpoint(Path(folder) / "in", model, layout, state))
        assert (source.model, source.layout, source.adam_step) == (model, layout, 11)
        assert source.run == RUN and source.environment["git_commit"] == "abc"
        for name, spec in layout.plan.items():
            kind = data.draw(st.sampled_from(ADAMW_KINDS))
            block = Block(part(data.draw, spec.rows), part(data.draw, spec.cols))
            whole = state[name][kind]
            wanted = whole[block.rows.start : block.rows.stop, block.cols.start : block.cols.stop]
            assert torch.equal(source.read(name, kind, block), wanted)


@pytest.fixture
def path(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "in", MODEL, LAYOUT, random_state(LAYOUT.plan))


def test_a_shard_without_one_of_its_tensors_is_damage(path):
    file = path / "rank-00001.safetensors"
    found = load_file(file)
    found["x" + "y" * 23] = found.pop("model.norm.weight.exp_avg")
    save_file(found, file)
    manifest = parse_manifest(path)
    write_manifest(path, replace(manifest, files=manifest.files | {file.name: record_of(file)}))
    with pytest.raises(
        InputError, match=r"rank-00001.*does not contain model.norm.weight.exp_avg;"
    ):
        open_checkpoint(path)


def test_a_shard_of_another_layout_is_damage(path):
    manifest = parse_manifest(path)
    write_manifest(path, replace(manifest, layout=manifest.layout | {"zero_stage": 3}))
    with pytest.raises(InputError, match=r"safetensors: .* is F32 \[\d+\], not F32 \[\d+\]"):
        open_checkpoint(path)


def test_a_rank_opens_only_the_files_that_it_reads(tmp_path: Path) -> None:
    """Neither sizes nor headers of the other files of a verified checkpoint of 64 ranks."""
    wide = layout_of(MODEL, 2, 64, 1)
    state = random_state(wide.plan)
    path = write_checkpoint(tmp_path / "in", MODEL, wide, state)
    assert len(parse_manifest(path).files) == 64
    opened, sized = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_header", lambda file: opened.append(file) or read_header(file))
        patch.setattr(manifest_module, "check_size", lambda file, record: sized.append(file))
        for rank in (0, 5):
            source, storage = open_found(path), empty_storage(wide, rank, 0.0)
            fill_read(wide, rank, storage, ADAMW_KINDS, source.read)
            assert same(storage, storage_of(wide, state, rank))
            assert opened == [path / shard_name(rank)] and not sized
            opened.clear()


def test_a_checkpoint_with_a_flipped_bit_is_no_source(path):
    open_source(path)
    file = path / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"rank-00001.safetensors: damaged, its checksum is"):
        open_source(path)


def test_a_run_gives_its_newest_whole_checkpoint(path, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        shutil.copytree(path, folder / f"step-{step:09d}")
    (folder / "step-000000003" / "rank-00000.safetensors").unlink()
    with captured_logs() as messages:
        for place in (tmp_path / "run", folder):
            assert open_source(place).path.name == "step-000000002"
    assert len(messages) == 2 and "skipped a damaged checkpoint" in messages[0]


def test_what_is_no_source_is_named(tmp_path):
    with pytest.raises(InputError, match="neither a checkpoint nor a run directory nor"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="gone: no such directory"):
        open_source(tmp_path / "gone")
