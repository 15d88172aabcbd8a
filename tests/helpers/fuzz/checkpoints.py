"""Targets: headers of safetensors files, manifests of checkpoints, Hugging Face folders."""

import json
import struct
from argparse import Namespace
from functools import cache
from io import BytesIO
from math import prod
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from zipfile import ZipFile, ZipInfo

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from megagrow.checkpoint.listing import summary
from megagrow.checkpoint.manifest import MANIFEST_FILE
from megagrow.checkpoint.source import Source, open_checkpoint
from megagrow.checkpoint.tensor_file import DTYPES, Stored, read_elements, read_header
from megagrow.common.checksums import text_checksum
from megagrow.config.schema import ModelConfig
from megagrow.formats.hugging_face import open_hugging_face
from megagrow.formats.hugging_face_config import config_of
from megagrow.formats.megatron import RANK_FILE, MegatronTarget, open_megatron
from megagrow.formats.torch_file import read_torch_file
from megagrow.reshard.layout import Block
from megagrow.train.train_state import RunState
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.fuzz.mutations import damaged, mutated_bytes, mutated_tree
from tests.helpers.fuzz.running import Target
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of

MODEL = ModelConfig(
    num_hidden_layers=1,
    hidden_size=4,
    num_attention_heads=2,
    intermediate_size=4,
    vocab_size=5,
)
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
SECOND = "model-00002-of-00002.safetensors"


@st.composite
def _header_files(draw: st.DrawFn) -> bytes:
    """A header, its length (which may be another one), and the tensors."""
    text = draw(damaged(HEADER))
    length = draw(st.sampled_from((len(text), len(text), len(text) + 1, 0, 2**63, 2**64 - 1)))
    raw = struct.pack("<Q", length) + text + bytes(range(40))
    return draw(st.one_of(st.just(raw), st.just(raw), mutated_bytes(raw)))


def _load_header(folder: Path, raw: bytes) -> None:
    """If a file is accepted here, the format's own library accepts too, and sees the same in it."""
    path = folder / "file.safetensors"
    path.write_bytes(raw)
    found = read_header(path)
    if any(stored.dtype not in DTYPES for stored in found.values()):
        return  # of types that are not read only the place is looked at
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == found.keys()
        for name, stored in found.items():
            tensor = theirs.get_tensor(name)
            assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, DTYPES[stored.dtype])
            mine = read_elements(path, stored, range(tensor.numel()))
            assert mine.view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


@cache
def _checkpoint() -> Path:
    """A folder with a checkpoint, written once."""
    folder = Path(mkdtemp()) / "step-000000005"
    layout = layout_of(MODEL, 2, 2, 1, "matrices")
    return write_checkpoint(folder, MODEL, layout, random_state(layout.plan))


def _manifest() -> dict[str, Any]:
    return json.loads((_checkpoint() / MANIFEST_FILE).read_text(encoding="utf-8"))


def _load_manifest(folder: Path, raw: bytes) -> None:
    for path in _checkpoint().iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / MANIFEST_FILE).write_bytes(_resealed(raw))
    for _, shown in summary(folder).items():
        str(shown)
    source = open_checkpoint(folder)
    assert source.run is not None
    assert RunState.from_json(source.run, source.environment).stage >= 0
    assert {path.parent for path in source.files} <= {folder}
    _read_all(source)


def _resealed(raw: bytes) -> bytes:
    """With the checksum that belongs to it: who writes one on purpose can compute that too."""
    try:
        values = json.loads(raw)
        del values["checksum"]
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    except (ValueError, TypeError, KeyError, RecursionError):
        return raw
    return json.dumps(values | {"checksum": text_checksum(text)}).encode()


def _read_all(source: Source) -> None:
    """Every tensor can be read, and is of the shape that the model has."""
    for name, spec in source.layout.plan.items():
        for kind in source.kinds:
            block = Block(range(spec.rows), range(spec.cols))
            assert source.read(name, kind, block).shape == (spec.rows, spec.cols)


@cache
def _weights() -> dict[str, torch.Tensor]:
    state = random_state(layout_of(MODEL, 0, 1, 1).plan)
    return {
        name: kinds["fp32"].squeeze(1) if kinds["fp32"].shape[1] == 1 else kinds["fp32"]
        for name, kinds in state.items()
    }


def _config() -> dict[str, Any]:
    return config_of(MODEL, "F32", {})


def _index() -> dict[str, Any]:
    names = list(_weights())
    files = [("model-00001-of-00002.safetensors", SECOND)[i % 2] for i in range(len(names))]
    return {"metadata": {"total_size": 1}, "weight_map": dict(zip(names, files, strict=True))}


def _load_hugging_face(folder: Path, given: tuple[bytes, bytes]) -> None:
    if not (folder / SECOND).exists():
        held: dict[str, dict[str, torch.Tensor]] = {}
        for name, file in _index()["weight_map"].items():
            held.setdefault(file, {})[name] = _weights()[name]
        for file, tensors in held.items():
            save_file(tensors, folder / file, {"format": "pt"})
    (folder / "config.json").write_bytes(given[0])
    (folder / "model.safetensors.index.json").write_bytes(given[1])
    source = open_hugging_face(folder)
    assert {path.parent for path in source.files} <= {folder}
    _read_all(source)


SAVED = {"param": torch.arange(8.0).view(2, 4), "args": Namespace(a=[1, 2.5, None]), "b": {"c": -1}}


@cache
def _torch_file() -> dict[str, bytes]:
    """The records of a file of torch.save, the pickle first."""
    saved = BytesIO()
    torch.save(SAVED, saved)
    with ZipFile(saved) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _load_torch_file(folder: Path, raw: bytes) -> None:
    """A changed pickle in an archive that fits to it; its tensors lie in the file."""
    path = folder / "x.pt"
    first, *records = _torch_file()
    with ZipFile(path, "w") as archive:
        archive.writestr(ZipInfo(first), raw)
        for name in records:
            archive.writestr(ZipInfo(name), _torch_file()[name])
    found = read_torch_file(path)
    for stored in found.values() if isinstance(found, dict) else ():
        if isinstance(stored, Stored) and stored.dtype in DTYPES:
            read_elements(path, stored, range(prod(stored.shape)))


@cache
def _megatron() -> dict[str, Any]:
    """The content of a Megatron-LM file, with its arguments as a dict."""
    source, folder = open_checkpoint(_checkpoint()), Path(mkdtemp())
    MegatronTarget(source, 1, 1, "F32").write(folder, 5, lambda _: None)
    (path,) = folder.rglob(RANK_FILE)
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(path, weights_only=True)
    return content | {"args": vars(content["args"])}


def _load_megatron(folder: Path, tree: Any) -> None:
    if isinstance(tree, dict) and isinstance(tree.get("args"), dict):
        args = Namespace()
        vars(args).update({str(key): item for key, item in tree["args"].items()})
        tree = tree | {"args": args}
    (folder / "mp_rank_00").mkdir(exist_ok=True)
    torch.save(tree, folder / "mp_rank_00" / RANK_FILE)
    _read_all(open_megatron(folder, None))


TARGETS = [
    Target("safetensors header", _header_files(), _load_header),
    Target(
        "torch.save",
        st.deferred(lambda: mutated_bytes(next(iter(_torch_file().values())))),
        _load_torch_file,
    ),
    Target("megatron", st.deferred(lambda: mutated_tree(_megatron())), _load_megatron),
    Target("checkpoint manifest", st.deferred(lambda: damaged(_manifest())), _load_manifest),
    Target(
        "config.json, index.json",
        st.deferred(lambda: st.tuples(damaged(_config()), damaged(_index()))),
        _load_hugging_face,
    ),
]
