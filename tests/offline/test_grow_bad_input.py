"""Bad input to a growth of files: one line that says what to do, exit code 2, nothing lost."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megagrow.cli.app
from megagrow.errors import InputError
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.checkpoint.written import differences, shards, write_checkpoint
from tests.helpers.disks import small_disk
from tests.helpers.jobs import write_run
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of
from tests.helpers.runs import make_run
from tests.helpers.train.file_growths import ANY, BASE, DEEP, LOW_EPS, WIDE, base, grow, model_file

LAYOUT = layout_of(base(), 1, 2, 1)


@pytest.fixture
def path(tmp_path) -> Path:
    state = random_state(parameter_plan(base(), 1))
    return write_checkpoint(tmp_path / "in", base(), LAYOUT, state)


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "not growable": (
        {"num_hidden_layers": 5},
        {},
        "target.model.num_hidden_layers = 5 is not divisible by source.model.num_hidden_layers = "
        "2; use a multiple or set target.growth.layer_map",
    ),
    "another model": (
        {"tie_word_embeddings": True},
        {},
        "target.model changes tie_word_embeddings from False to True, which direct_depth cannot",
    ),
    "smaller": (
        {"vocab_size": 5},
        {"operators": ("vocabulary",)},
        "reduces vocab_size from 37 to 5; growth cannot shrink",
    ),
    "learned": (DEEP, {"operators": ("learn_depth",)}, "learn_depth is trained before it is"),
    "probe": (
        DEEP,
        {"overrides": ('growth.probe={operators: ["solar", "mslt"]}',)},
        "growth.probe trains each operator",
    ),
    "estimate_second_moment": (
        DEEP,
        {"overrides": ("growth.optimizer_state=estimate_second_moment",)},
        "requires training batches",
    ),
    "masks": (
        ANY,
        {"operators": ("random_width",), "form": "huggingface"},
        "random_width uses growth masks, which a Hugging Face model does not support",
    ),
    "unknown option": (
        DEEP,
        {"overrides": ("growth.layer=stack",)},
        "unknown key 'stages.0.growth.layer'; did you mean 'stages.0.growth.layer_map'?",
    ),
    "wrong option": (DEEP, {"overrides": ("growth.noise=-1",)}, "growth.noise: Input should be"),
    "other key": (DEEP, {"overrides": ("seed=3",)}, "--set seed=3: only growth.KEY=VALUE can"),
    "no operator": (DEEP, {"operators": ("stack",)}, "growth.operator.0: Input should be"),
    "stage": (DEEP, {"stage": 1}, "--stage requires a run file"),
    "tp": (WIDE, {"operators": ("direct_width",), "tp": 3}, "--tp 3 does not divide num_attention"),
    "layout": (DEEP, {"form": "huggingface", "dp": 2}, "a Hugging Face folder has no layout"),
    "format": (DEEP, {"form": "megatron"}, "--format megatron: should be one of checkpoint, hugg"),
    "dtype": (DEEP, {"dtype": "int8"}, "--dtype int8: should be one of float32, float16, bfloat16"),
    "memory": (DEEP, {"memory": "lots"}, "--memory lots: should be a number of bytes such as 1GiB"),
    "one row": (DEEP, {"memory": "1MiB"}, "--memory 1 MiB is too small for one row of this model"),
    "text": (DEEP, {"text": Path("x")}, "--text requires --tokenizer"),
    "tokenizer": (DEEP, {"tokenizer": "x"}, "--tokenizer requires --text"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_requests_that_can_not_be_met(path, tmp_path, name):
    changes, request, said = REFUSALS[name]
    to = model_file(tmp_path / "model.yaml", changes)
    with pytest.raises(InputError) as error:
        grow(**{"source": path, "out": tmp_path / "out", "to": to} | request)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"in", "model.yaml"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hidden_sise: 3", "model.yaml: unknown key 'hidden_sise'; did you mean 'hidden_size'?"),
        ("num_hidden_layers: 3", "model.yaml: 'hidden_size': Field required"),
        ("base: llama-9b", "'llama-9b': model/llama-9b.yaml not found; did you mean"),
        ("- 3", "model.yaml: must contain a mapping"),
    ],
)
def test_model_files_that_hold_no_model(path, tmp_path, text, said):
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(InputError, match=r"^[^\n]*$") as error:
        grow(source=path, out=tmp_path / "out", to=str(tmp_path / "model.yaml"))
    assert said in str(error.value)


def test_models_that_are_not_there(path, tmp_path):
    request: dict[str, Any] = {"source": path, "out": tmp_path / "out"}
    with pytest.raises(InputError, match=r"'llama-2b': model/llama-2b\.yaml not found"):
        grow(to="llama-2b", **request)
    with pytest.raises(InputError, match=r"gone\.yaml: no such file"):
        grow(to="gone.yaml", **request)


def test_runs_that_do_not_begin_where_the_source_stands(path, tmp_path):
    deep = {"model": BASE | DEEP, "growth": {}, "tokens": 640}
    deeper = {"model": BASE | {"num_hidden_layers": 8}, "growth": {}, "tokens": 640}
    run = make_run(tmp_path, [{"model": BASE, "tokens": 640}, deep, deeper])
    to = str(write_run(tmp_path / "run.yaml", run))
    request: dict[str, Any] = {"source": path, "out": tmp_path / "out", "to": to}
    for stage in (0, 3):
        with pytest.raises(InputError, match=f"no growth leads to stage {stage}, it has stages 0"):
            grow(stage=stage, **request)
    with pytest.raises(InputError, match=r"is of stage 0; the growth to stage 2 of .* begins at"):
        grow(stage=2, **request)
    other = make_run(tmp_path, [{"model": BASE | ANY | LOW_EPS, "tokens": 640}, deep])
    write_run(tmp_path / "run.yaml", other)
    with pytest.raises(InputError, match=r"hidden_size is 16, stage 0 of .* has 24"):
        grow(**request)


def truncate(path: Path) -> None:
    file = path / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def scramble(path: Path) -> None:
    file = path / "rank-00001.safetensors"
    file.write_bytes(bytes(8) + file.read_bytes()[8:])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (shutil.rmtree, "in: no such directory"),
    "empty": (lambda path: (path / "manifest.json").unlink(), "neither a checkpoint nor a run"),
    "truncated": (truncate, "rank-00001.safetensors: truncated or damaged"),
    "header": (scramble, "rank-00001.safetensors: damaged, its checksum is"),
    "manifest": (lambda path: (path / "manifest.json").write_text("{"), "manifest.json: damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_command_line_says_one_line_and_leaves_with_2(
    path, tmp_path, capsys, monkeypatch, name
):
    DAMAGES[name][0](path)
    out = tmp_path / "out"
    to = model_file(tmp_path / "model.yaml", DEEP)
    monkeypatch.setattr(sys, "argv", ["megagrow", "grow", str(path), str(out), "--to", to])
    with pytest.raises(SystemExit) as end:
        megagrow.cli.app.main()
    said = capsys.readouterr()
    assert end.value.code == 2 and not said.out
    assert DAMAGES[name][1] in said.err and said.err.startswith("error: ")
    assert said.err.count("\n") == 1 and not out.exists()


def test_what_is_at_the_place_of_the_output_is_left_alone(path, tmp_path):
    request: dict[str, Any] = {"source": path, "to": model_file(tmp_path / "model.yaml", DEEP)}
    with pytest.raises(InputError, match="in: already exists; remove it or choose another path"):
        grow(out=path, **request)
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "precious").write_text("!")
    with pytest.raises(
        InputError, match=r"out\.tmp: exists but is not an unfinished growth; remove it"
    ):
        grow(out=tmp_path / "out", **request)
    assert (tmp_path / "out.tmp" / "precious").read_text() == "!"


def test_a_full_disk_loses_nothing(path, tmp_path, monkeypatch):
    to = model_file(tmp_path / "model.yaml", DEEP)
    grow(source=path, out=tmp_path / "good", to=to)
    with small_disk(tmp_path / "disk", 256 * 2**10) as disk:
        request: dict[str, Any] = {"source": path, "out": disk / "out", "to": to}
        (disk / "big").write_bytes(bytes(200 * 2**10))
        with pytest.raises(InputError, match=r"free, .* KiB required; free the disk"):
            grow(**request)
        # Somebody else fills the disk when the work has begun.
        monkeypatch.setattr("megagrow.offline.grow.check_space", lambda *_: None)
        with pytest.raises(InputError, match=r"No space left on device.*rerun the same command"):
            grow(**request)
        assert not (disk / "out").exists() and (disk / "out.tmp").is_dir()
        (disk / "big").unlink()
        grow(**request)
        assert differences(shards(disk / "out"), shards(tmp_path / "good")) == []
    assert (path / "manifest.json").is_file()


def test_a_byte_that_changes_on_the_disk_is_noticed_and_made_again(path, tmp_path, monkeypatch):
    request: dict[str, Any] = {"source": path, "to": model_file(tmp_path / "model.yaml", DEEP)}
    grow(out=tmp_path / "good", **request)
    file = tmp_path / "out.tmp" / "rank-00000.safetensors"

    def flip(folder: Path) -> None:
        if folder == file:
            data = bytearray(file.read_bytes())
            data[-5] ^= 1
            file.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr("megagrow.offline.writer.drop_from_cache", flip)
        with pytest.raises(InputError, match=r"differs from the written data; rerun the same"):
            grow(out=tmp_path / "out", **request)
    assert not (tmp_path / "out").exists()
    grow(out=tmp_path / "out", **request)
    assert differences(shards(tmp_path / "out"), shards(tmp_path / "good")) == []


def test_another_command_does_not_go_on(path, tmp_path, monkeypatch):
    request: dict[str, Any] = {"source": path, "out": tmp_path / "out"}
    first = model_file(tmp_path / "a.yaml", DEEP)
    with monkeypatch.context() as patch:
        patch.setattr("megagrow.offline.writer.Writing.verify", raise_error)
        with pytest.raises(InputError, match="stop"):
            grow(to=first, **request)
    other = model_file(tmp_path / "b.yaml", {"num_hidden_layers": 6})
    with pytest.raises(InputError, match="started by another command"):
        grow(to=other, **request)
    assert "written and checked" in grow(to=first, memory="64MiB", **request)
    # Killed when only the journal was still to go: the same command ends that.
    journal = json.dumps({"another": "command"}) + "\n"
    (tmp_path / "out" / "journal.jsonl").write_text(journal)
    with pytest.raises(InputError, match="started by another command"):
        grow(to=first, **request)


def raise_error(*_: object) -> None:
    raise InputError("stop")


def test_the_same_command_ends_what_only_lacks_its_end(path, tmp_path, monkeypatch):
    to = model_file(tmp_path / "model.yaml", DEEP)
    request: dict[str, Any] = {"source": path, "out": tmp_path / "out", "to": to}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", raise_error)
        with pytest.raises(InputError, match="stop"):
            grow(**request)
    assert (tmp_path / "out" / "journal.jsonl").is_file()
    assert "already finished" in grow(**request)
    assert not (tmp_path / "out" / "journal.jsonl").exists()
    with pytest.raises(InputError, match="already exists"):
        grow(**request)
