"""The regression check finds differences in every kind of data, and ignores times."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tools.regression.cases import CASES
from tools.regression.equality import Comparison, compare_folders, flatten

METRICS = (
    {"kind": "train", "step": 1, "loss": 2.5, "grad_norm": 0.1, "seconds": 0.3},
    {"kind": "checkpoint", "step": 1, "stall_seconds": 0.2, "path": "run/checkpoints/step-1"},
    {"kind": "train", "step": 2, "loss": 2.25, "grad_norm": None, "seconds": 0.2},
    {"kind": "growth", "step": 2, "optimizer_state": "keep_v"},
)
MANIFEST = {"adam_step": 3, "run": {"stage": 1, "counters": {"tokens": 64}}, "checksum": "a"}


def write(folder: Path, **changes: Any) -> Path:
    """Write one file of each kind; `changes` replaces contents."""
    tensor = np.arange(6, dtype=np.float32).reshape(2, 3)
    values = {"metrics": METRICS, "manifest": MANIFEST, "tensor": tensor, "bytes": b"ab"} | changes
    checkpoint = folder / "run" / "checkpoints" / "step-000000002"
    checkpoint.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in values["metrics"])
    (folder / "run" / "metrics.jsonl").write_text(lines, encoding="utf-8")
    (checkpoint / "manifest.json").write_text(json.dumps(values["manifest"]), encoding="utf-8")
    save_file({"norm.weight": values["tensor"]}, checkpoint / "rank-00000.safetensors")
    (folder / "train.bin").write_bytes(values["bytes"])
    args = argparse.Namespace(layers=2)
    torch.save({"args": args, "model": torch.tensor(values["tensor"])}, folder / "model.pt")
    (folder / "train.log").write_text(str(changes), encoding="utf-8")
    return folder


def compare(tmp_path: Path, **changes: Any) -> Comparison:
    """Compare the default data with changed data."""
    return compare_folders(write(tmp_path / "old"), write(tmp_path / "new", **changes))


def test_equal_data_is_equal_and_counted(tmp_path: Path) -> None:
    comparison = compare(tmp_path)
    assert comparison.difference is None
    assert comparison.values > 6 + 7 + 2 + 8  # both tensors, the bytes, the fields of records


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": [record | {"seconds": 9.0, "path": "x"} for record in METRICS]},
        {"metrics": [METRICS[i] for i in (0, 2, 1, 3)]},
        {"metrics": [*METRICS[:3], METRICS[3] | {"optimizer_state": "keep_second_moment"}]},
        {"manifest": MANIFEST | {"checksum": "b", "environment": {"python": "4"}}},
    ],
    ids=["times and paths", "a save that ends later", "an alias", "the environment"],
)
def test_ignored_differences(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert compare(tmp_path, **changes).difference is None


def last_bit(values: np.ndarray) -> np.ndarray:
    """Return the values with the last bit of one of them flipped."""
    changed = values.copy()
    changed.view(np.uint32)[1, 2] ^= 1
    return changed


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"metrics": [METRICS[0] | {"loss": 2.5000000000000004}, *METRICS[1:]]}, "train 0 (step 1"),
        ({"metrics": METRICS[:3]}, "growth 0"),
        ({"metrics": [METRICS[0] | {"grad_norm": None}, *METRICS[1:]]}, "grad_norm"),
        ({"manifest": MANIFEST | {"adam_step": 4}}, "adam_step: 3 != 4"),
        ({"manifest": MANIFEST | {"run": {"stage": 1, "counters": {"tokens": 65}}}}, "tokens"),
        ({"bytes": b"aB"}, "train.bin: bytes: 1 of 2 elements differ, the first at index 1"),
        ({"bytes": b"abc"}, "train.bin"),
        ({"tensor": np.zeros((3, 2), np.float32)}, "model.pt"),
        ({"tensor": np.arange(6, dtype=np.float64).reshape(2, 3)}, "model.pt"),
        ({"tensor": last_bit(np.arange(6, dtype=np.float32).reshape(2, 3))}, "1 of 6 elements"),
    ],
)
def test_differences_are_found(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    assert named in str(compare(tmp_path, **changes).difference)


def test_a_tensor_of_a_checkpoint_and_minus_zero_are_compared_by_bits(tmp_path: Path) -> None:
    folders = [write(tmp_path / name) for name in ("old", "new")]
    for folder, value in zip(folders, (0.0, -0.0), strict=True):
        save_file({"w": np.array([value], np.float32)}, folder / "x.safetensors")
    difference = str(compare_folders(*folders).difference)
    assert difference == "x.safetensors: w: 1 of 1 elements differ, the first at index 0"


def test_a_missing_file_and_an_empty_folder_are_differences(tmp_path: Path) -> None:
    folders = [write(tmp_path / name) for name in ("old", "new")]
    (folders[1] / "train.bin").unlink()
    assert compare_folders(*folders).difference == "train.bin is missing in NEW"
    empty = [tmp_path / name for name in ("a", "b")]
    for folder in empty:
        folder.mkdir()
    assert "no data" in str(compare_folders(*empty).difference)


def test_flattening_keeps_the_types_of_nested_values() -> None:
    flat = flatten({"a": [1, {"seconds": 2.0, "b": True}], "c": 1.0}, "")
    assert flat == {"a length": 2, "a[0]": 1, "a[1].b": True, "c": 1.0}
    assert [type(value) for value in flat.values()] == [int, int, bool, float]


def test_every_case_names_known_cases() -> None:
    for case in CASES.values():
        assert {*case.sources, case.reference or case.name} <= CASES.keys()
    assert len([name for name in CASES if name.startswith("cross-resume-z")]) == 8
