"""`megagrow checkpoint` with valid and damaged checkpoints."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megagrow.checkpoint.discovery import checkpoint_name
from megagrow.checkpoint.manifest import BEFORE_GROWTH, read_manifest, write_manifest
from megagrow.cli.app import app
from megagrow.common.sizes import format_bytes
from megagrow.errors import InputError
from tests.helpers.checkpoint.damage import SHARD, flip, truncate
from tests.helpers.checkpoint.saving import MODEL
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of

STEPS = (9, 10, 20, 100)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory with four checkpoints; the one of step 10 is protected."""
    run, layout = tmp_path_factory.mktemp("original") / "run", layout_of(MODEL, 1, 2, 1)
    for step in STEPS:
        path = run / "checkpoints" / checkpoint_name(step)
        write_checkpoint(path, MODEL, layout, random_state(layout.plan))
    path = run / "checkpoints" / checkpoint_name(10)
    write_manifest(path, replace(read_manifest(path), protected=BEFORE_GROWTH))
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """Copy of the run directory."""
    return shutil.copytree(original, tmp_path / "run")


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / checkpoint_name(step)


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, words)])


def rows(result: Result) -> list[list[str]]:
    """Return the cells of a Markdown table; a long cell continues on the next line."""
    found: list[list[str]] = []
    for line in result.output.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells[0]:
            found.append(cells)
        elif line.startswith("|"):
            found[-1] = [f"{a} {b}".strip() for a, b in zip(found[-1], cells, strict=True)]
    return found[2:]


def test_ls_lists_valid_damaged_and_unfinished_checkpoints(run):
    truncate(at(run, 20))
    (at(run, 100) / "manifest.json").write_text("{")
    at(run, 120).with_suffix(".tmp").mkdir()
    table = rows(call("ls", run))
    size = read_manifest(at(run, 9)).size
    position = ["0", "640", format_bytes(size), "ZeRO 1, DP 2 x TP 1"]
    assert [row[0] for row in table] == ["9", "10", "20", "100", "120"]
    assert table[0] == ["9", *position, "", "valid"]
    assert table[1] == ["10", *position, "before growth", "valid"]
    assert (
        table[2][:-1] == ["20", *position, ""] and f"{SHARD}: truncated or damaged" in table[2][-1]
    )
    assert table[3][1:4] == ["?", "?", "?"] and "manifest.json: damaged" in table[3][-1]
    assert table[4][-1] == "unfinished"


def test_verify_reads_every_byte(run):
    result = call("verify", run)
    assert (result.exit_code, result.output.count(": valid\n")) == (0, len(STEPS))
    flip(at(run, 10))
    (at(run, 20) / SHARD).unlink()
    result = call("verify", run)
    assert result.exit_code == 1 and result.output.count(": valid\n") == 2
    assert f"{at(run, 10) / SHARD}: damaged, its checksum is " in result.output
    assert f"{at(run, 20)}: {SHARD} is missing" in result.output
    assert call("verify", at(run, 9), at(run, 100)).exit_code == 0
    assert call("verify", at(run, 9), at(run, 10)).exit_code == 1


def test_verify_names_every_damaged_file(run):
    flip(at(run, 9))
    os.truncate(at(run, 9) / "rank-00000.safetensors", 10)
    output = call("verify", at(run, 9)).output
    assert len(output.splitlines()) == 2
    assert "rank-00000.safetensors: truncated or damaged, 10 bytes instead of" in output


def test_show(run):
    output = call("show", run).output
    assert str(at(run, 100)) in output
    assert re.search(r"rope_scaling +null *\n", output), "values as in a run file"
    for topic in ("num_hidden_layers", "ZeRO 1, DP 2 x TP 1", "adam_step", "stage_tokens", "640"):
        assert topic in output
    record = json.loads((at(run, 10) / "manifest.json").read_text())["files"][SHARD]
    output = call("show", at(run, 10)).output
    assert f"{record['bytes']} bytes, {record['xxh3_64']}" in output and "before growth" in output


PRUNED = {
    "the newest": (["--keep-last", 1], [10, 100]),
    "two": (["--keep-last", 2], [10, 20, 100]),
    "every": (["--keep-last", 1, "--keep-every", 9], [9, 10, 100]),
    "protected too": (["--keep-last", 1, "--include-protected"], [100]),
}


@pytest.mark.parametrize("name", PRUNED)
def test_prune(run, name):
    options, kept = PRUNED[name]
    gone = [step for step in STEPS if step not in kept]
    would = call("prune", run, *options, "--dry-run").output
    assert would == "".join(f"{at(run, step)}: would be removed\n" for step in gone)
    assert all(at(run, step).is_dir() for step in STEPS)
    done = call("prune", run, *options).output
    assert done == "".join(f"{at(run, step)}: removed\n" for step in gone)
    assert sorted((run / "checkpoints").iterdir()) == [at(run, step) for step in kept]


def test_prune_keeps_the_newest_valid_checkpoint_and_an_unfinished_save(run):
    flip(at(run, 100))  # its size is right
    writing = at(run, 120).with_suffix(".tmp")
    writing.mkdir()
    call("prune", run, "--keep-last", 1, "--include-protected")
    assert sorted((run / "checkpoints").iterdir()) == [at(run, 20), at(run, 100), writing]
    for step in (20, 100):
        truncate(at(run, step))
    call("prune", run, "--keep-last", 1, "--include-protected")
    assert at(run, 20).is_dir(), "nothing is removed if no checkpoint is valid"


@pytest.mark.parametrize("words", [["ls"], ["verify"], ["prune", "--keep-last", "1"]])
def test_a_folder_without_checkpoints_is_refused(tmp_path, words):
    result = call(*words, tmp_path)
    assert isinstance(result.exception, InputError)
    assert f"{tmp_path}: neither a run directory" in str(result.exception)
