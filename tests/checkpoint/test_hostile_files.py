"""Checkpoints, journals and folders of Hugging Face that somebody else has made."""

import json
import os
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megagrow.checkpoint.load import load_storage
from megagrow.checkpoint.manifest import read_manifest, write_manifest
from megagrow.checkpoint.source import open_checkpoint
from megagrow.checkpoint.tensor_file import read_header
from megagrow.config.load import load_run
from megagrow.data.manifest import CorpusManifest
from megagrow.errors import InputError
from megagrow.evaluation.results_store import read_stored
from megagrow.formats.deepspeed_universal import open_universal
from megagrow.formats.hugging_face import open_hugging_face
from megagrow.formats.hugging_face_config import config_of
from megagrow.formats.megatron import open_megatron
from megagrow.offline.journal import JOURNAL_FILE, Journal
from megagrow.train.reporting.metrics import read_metrics
from megagrow.train.source_state import state_of_found
from megagrow.train.train_state import RunState
from tests.helpers.checkpoint.saving import MODEL
from tests.helpers.checkpoint.written import RUN, record_of, write_checkpoint
from tests.helpers.reshard.definition import empty_storage, random_state
from tests.helpers.reshard.models import layout_of
from tests.helpers.spawn import run_ranks

LAYOUT = layout_of(MODEL, 0, 1, 1)
SHARD = "rank-00000.safetensors"
NORM = "model.norm.weight.fp32"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-000000005", MODEL, LAYOUT, random_state(LAYOUT.plan))


def forge(path: Path, tensor: torch.Tensor) -> None:
    """Puts another tensor in the place of one, and the right checksums into the manifest."""
    save_file(load_file(path / SHARD) | {NORM: tensor}, path / SHARD)
    manifest = read_manifest_of(path)
    write_manifest(path, replace(manifest, files={SHARD: record_of(path / SHARD)}))


def read_manifest_of(path: Path):
    file = path / "manifest.json"
    (path / SHARD).rename(path / "aside")
    write = json.loads(file.read_text())["files"][SHARD]["bytes"]
    (path / SHARD).write_bytes(bytes(write))
    manifest = read_manifest(path)
    (path / "aside").rename(path / SHARD)
    return manifest


def load(path: Path) -> str:
    try:
        load_storage(path, read_manifest(path), LAYOUT, empty_storage(LAYOUT, 0))
    except InputError as error:
        return str(error)
    return "loaded"


FORGED = {
    "short": (torch.ones(31), "is F32 [31], not F32 [32]"),
    "long": (torch.ones(33), "is F32 [33], not F32 [32]"),
    "a matrix": (torch.ones(32, 1), "is F32 [32, 1], not F32 [32]"),
    "another type": (torch.ones(32, dtype=torch.float16), "is F16 [32], not F32 [32]"),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", FORGED)
def test_a_shard_that_holds_something_else_is_named(checkpoint: Path, name: str) -> None:
    tensor, said = FORGED[name]
    forge(checkpoint, tensor)
    (problem,) = run_ranks(1, load, checkpoint)
    assert f"{checkpoint / SHARD}: cannot be read" in problem
    assert f"{NORM} {said}" in problem


@pytest.mark.parametrize("dp", [2**17, 2**40, 0, -1, True, 1.0, "1"])
def test_a_layout_of_more_ranks_than_files(checkpoint: Path, dp: object) -> None:
    manifest = read_manifest(checkpoint)
    write_manifest(
        checkpoint, replace(manifest, layout=manifest.layout | {"dp": dp, "zero_stage": 1})
    )
    with pytest.raises(InputError, match=r"damaged|rank-00000|names no rank-00001"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("vocab_size", [2**63 - 1, 2**60, 10**27])
def test_a_model_that_fits_nowhere(checkpoint: Path, vocab_size: int) -> None:
    manifest = read_manifest(checkpoint)
    model = manifest.model | {"vocab_size": vocab_size}
    write_manifest(checkpoint, replace(manifest, model=model))
    with pytest.raises(InputError, match=r"manifest\.json: damaged .* larger than any disk"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": -1},
        {"stage": "0"},
        {"stage_tokens": None},
        {"provenance": 3},
        {"provenance": [3]},
        {"counters": []},
        {"counters": {"step": 1.5}},
        {"counters": {"tokens": -1}},
        {"counters": {"flops": "many"}},
        {"counters": {"what": 1}},
        {"counters": {"step": 10**19}},
        {"counters": {"flops": 1e50}},
        {"counters": {"elapsed_seconds": -1.0}},
        {"counters": {"step": True}},
        {"counters": {"tokens": 10, "growth_tokens": 5}, "stage_tokens": 6},
        {"counters": {"step": 5, "tokens": 4}},
        {"stage": 2**70},
        {"stage_tokens": 641},
        {"skipped_tokens": -1},
        {"finished_tokens": [-1]},
        {"finished_tokens": [320]},
        {"stage": 1, "finished_tokens": [321]},
        {"provenance": [[2**64]]},
        {"operators": [[3]]},
        {"guard": {"losses": ["x"]}},
        {"guard": {"rewound_to": -2}},
        {"guard": {"unknown": 1}},
    ],
)
def test_a_run_that_stands_nowhere(changes: dict) -> None:
    RunState.from_json(RUN, {})
    with pytest.raises(InputError, match="run state in the checkpoint is"):
        RunState.from_json(RUN | changes, {})


@pytest.mark.parametrize(
    "line", [b"{", b"3", b"[1]", b'["1", 2]', b"[1, 2.5]", b"[1, NaN]", b"[[]]"]
)
def test_a_journal_with_a_damaged_line(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "data").touch()
    command = json.dumps({"to": 1}).encode()
    (tmp_path / JOURNAL_FILE).write_bytes(command + b"\n" + line + b"\n[1, 5]\n")
    with pytest.raises(InputError, match=rf"journal\.jsonl: .*remove {tmp_path}"):
        Journal(tmp_path, {"to": 1})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of Hugging Face with an index, and a file outside of it."""
    inner = tmp_path / "inner"
    inner.mkdir()
    tensors = {
        name: kinds["fp32"].flatten() if LAYOUT.plan[name].is_vector else kinds["fp32"]
        for name, kinds in random_state(LAYOUT.plan).items()
    }
    for file in (inner / "model-1.safetensors", tmp_path / "outside.safetensors"):
        save_file(tensors, file)
    (inner / "config.json").write_text(json.dumps(config_of(MODEL, "F32", {})))
    write_index(inner, "model-1.safetensors")
    return inner


def write_index(folder: Path, name: object) -> None:
    index = {"weight_map": dict.fromkeys(LAYOUT.plan, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..", "", None, ["x"], 3]
)
def test_an_index_cannot_name_files_elsewhere(folder: Path, name: object) -> None:
    assert open_hugging_face(folder).files == (folder / "model-1.safetensors",)
    write_index(folder, name)
    with pytest.raises(
        InputError, match=r"index\.json: .* is not the name of a file in its folder"
    ):
        open_hugging_face(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"vocab_size": 1, "vocab_size": 2}', "duplicate key"),
        ('{"rope_theta": NaN}', "NaN is not a JSON number"),
        ('{"rope_scaling": [1]}', "rope_scaling should be a mapping"),
        ("[]", "must contain a JSON object"),
    ],
)
def test_a_config_that_is_none(folder: Path, text: str, said: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=rf"config\.json: .*{said}"):
        open_hugging_face(folder)


GIGABYTES = {
    "manifest.json": lambda path: read_manifest(path.parent),
    "metrics.jsonl": read_metrics,
    "step-000000001.json": read_stored,
    "journal.jsonl": lambda path: Journal(path.parent, {"to": 1}),
    "megagrow.json": lambda path: open_universal(path.parent, None),
    "config.json": lambda path: open_hugging_face(path.parent),
    "latest_universal": lambda path: open_universal(path.parent, None),
    "latest_checkpointed_iteration.txt": lambda path: open_megatron(path.parent, None),
    "run.yaml": load_run,
    "train/manifest.json": lambda path: CorpusManifest.read(path.parent),
}


@pytest.mark.parametrize("name", GIGABYTES)
def test_files_of_many_gigabytes_are_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name != "latest_universal":
        (tmp_path / "zero").mkdir()
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, 10**11)
    begin = time.perf_counter()
    with pytest.raises(InputError, match=rf"{name}.* limit of \d+ bytes"):
        GIGABYTES[name](path)
    assert time.perf_counter() - begin < 10


def test_a_header_of_a_million_tensors_is_not_parsed(tmp_path: Path) -> None:
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    header = b"{" + b"".join(entry % number for number in range(10**6))
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    begin = time.perf_counter()
    with pytest.raises(InputError, match=r"x\.safetensors: .*1000000 tensors, more than the limit"):
        read_header(path)
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("step", [4, 600])
def test_a_step_other_than_that_of_its_folder(checkpoint: Path, step: int) -> None:
    manifest = read_manifest(checkpoint)
    assert state_of_found((checkpoint, manifest)).counters.step == 5
    run = manifest.run | {"counters": manifest.run["counters"] | {"step": step}}
    with pytest.raises(InputError, match=rf"records step {step}, but is named by step 5"):
        state_of_found((checkpoint, replace(manifest, run=run)))
