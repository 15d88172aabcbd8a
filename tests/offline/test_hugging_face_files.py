"""All files that a user of a model needs go through imports, growths and exports."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from megagrow.checkpoint.manifest import read_manifest
from megagrow.data.prepare import prepare
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.data.tokenizers import load_tokenizer
from megagrow.errors import InputError
from megagrow.formats.hugging_face import open_hugging_face
from megagrow.formats.hugging_face_config import code_warnings
from megagrow.formats.hugging_face_origin import HuggingFaceOrigin, read_chat_template
from megagrow.offline.convert import export_hugging_face, import_hugging_face
from megagrow.offline.hugging_face_files import hugging_face_files
from megagrow.offline.request import Request
from tests.helpers.checkpoint.written import set_environment, write_checkpoint
from tests.helpers.hugging_face import chat_folder, hugging_face, tiny
from tests.helpers.logs import captured_logs
from tests.helpers.reshard.definition import random_state
from tests.helpers.reshard.models import layout_of
from tests.helpers.train.file_growths import grow, model_file

DEEP = {"num_hidden_layers": 4, "vocab_size": 301}
KEYS_OF_CODE = {"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"}


def convert(how: Any, source: Path, out: Path, **options: Any) -> list[str]:
    """Run a conversion; returns its log messages."""
    form = "huggingface" if how is export_hugging_face else "checkpoint"
    with captured_logs() as messages:
        how(Request(source=source, out=out, form=form, **options), Console(quiet=True))
    return messages


def document(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def assert_complete(out: Path, source: Path) -> None:
    """transformers finds the same in both folders, and the texts are equal."""
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (out, source))
    assert ours("a b c")["input_ids"] == theirs("a b c")["input_ids"]
    assert ours.chat_template == theirs.chat_template is not None
    mine, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, source))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(mine.config, key) == getattr(other.config, key)
    assert mine.generation_config.to_dict() == other.generation_config.to_dict()
    assert mine.config.eos_token_id == [2, 7] and mine.generation_config.temperature == 0.5
    for name in ("README.md", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert not KEYS_OF_CODE & document(out, name).keys()
    assert not list(out.rglob("*.py"))


@pytest.fixture
def source(tmp_path) -> Path:
    return chat_folder(tmp_path / "source")


def test_files_go_through_a_checkpoint_and_a_growth(source, tmp_path):
    messages = convert(import_hugging_face, source, tmp_path / "in")
    reason = "dropped keys that make transformers run code"
    assert messages == [
        f"{source / 'config.json'}: {reason}: auto_map, custom_pipelines",
        f"{source / 'generation_config.json'}: {reason}: custom_generate",
    ]
    grow(
        source=tmp_path / "in",
        out=tmp_path / "grown",
        to=model_file(tmp_path / "m.yaml", tiny(**DEEP).model_dump()),
        operators=("zero_depth",),
    )
    (line,) = convert(export_hugging_face, tmp_path / "grown", tmp_path / "out")
    assert line == f"{source / 'tokenizer_config.json'}: {reason}: auto_map"
    assert_complete(tmp_path / "out", source)
    assert document(tmp_path / "out", "config.json")["num_hidden_layers"] == 4


def test_files_go_from_folder_to_folder(source, tmp_path):
    shutil.copytree(source, tmp_path / "moved")
    additional = source / "additional_chat_templates"
    additional.mkdir()
    (additional / "tools.jinja").write_text("tools: {{ tools }}")
    (source / "chat_template.jinja").write_text("other: {{ messages }}")
    grow(
        source=source,
        out=tmp_path / "out",
        to=model_file(tmp_path / "m.yaml", tiny(**DEEP).model_dump()),
        operators=("zero_depth",),
    )
    assert_complete(tmp_path / "out", source)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert theirs == {"default": "other: {{ messages }}", "tools": "tools: {{ tools }}"}
    assert read_chat_template(tmp_path / "out") == [
        {"name": name, "template": template} for name, template in theirs.items()
    ]


def test_texts_survive_the_loss_of_their_folder(source, tmp_path):
    convert(import_hugging_face, source, tmp_path / "in")
    moved = source.rename(tmp_path / "moved")
    (line,) = convert(export_hugging_face, tmp_path / "in", tmp_path / "out")
    assert f"written without a tokenizer: {source}, named by the source, does not exist" in line
    assert line.endswith("; add one with --tokenizer PATH")
    assert (tmp_path / "out" / "README.md").read_bytes() == (moved / "README.md").read_bytes()
    assert document(tmp_path / "out", "generation_config.json")["eos_token_id"] == [2, 7]
    # A run names the same tokenizer without the template, which comes from the record.
    shutil.copyfile(moved / "tokenizer.model", tmp_path / "t.model")
    run = {"config": {"data": {"tokenizer": str(tmp_path / "t.model"), "train": []}}}
    set_environment(tmp_path / "in", read_manifest(tmp_path / "in").environment | run)
    assert convert(export_hugging_face, tmp_path / "in", tmp_path / "again") == []
    assert_complete(tmp_path / "again", moved)


def test_the_tokenizer_of_a_corpus_is_that_of_its_run(tmp_path):
    (tmp_path / "a.txt").write_text("a small model grows into a large one\n" * 99)
    train_sentencepiece(["a small model grows into a large one\n" * 20], 280, tmp_path / "t.model")
    prepare([str(tmp_path / "a.txt")], tmp_path / "corpus", str(tmp_path / "t.model"),
            validation_fraction=0, workers=1, console=Console(quiet=True))  # fmt: skip
    model = tiny(vocab_size=301)
    layout = layout_of(model, 1, 1, 1)
    write_checkpoint(tmp_path / "in", model, layout, random_state(layout.plan))
    data = {"tokenizer": None, "train": [{"path": str(tmp_path / "corpus" / "train")}]}
    set_environment(tmp_path / "in", {"config": {"data": data}})
    assert convert(export_hugging_face, tmp_path / "in", tmp_path / "out") == []
    theirs, ours = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        load_tokenizer(tmp_path / "t.model"),
    )
    assert [theirs("a model")["input_ids"]] == ours.encode_batch(["a model"])
    for checksum, lines in ((ours.checksum, 0), ("0" * 32, 1)):
        contents = {"train": ["x"], "validation": [], "tokenizer": checksum}
        set_environment(tmp_path / "in", {"config": {"data": data}, "contents": contents})
        out, given = tmp_path / f"out{lines}", tmp_path / f"given{lines}"
        said = convert(export_hugging_face, tmp_path / "in", out)
        assert len(said) == lines and (out / "tokenizer.json").is_file() == (not lines)
        told = convert(export_hugging_face, tmp_path / "in", given, tokenizer=tmp_path / "t.model")
        assert len(told) == lines and (given / "tokenizer.json").is_file()
    assert f"{tmp_path / 'corpus' / 'tokenizer.model'}: another tokenizer than the one " in said[0]
    assert told[0].startswith(f"{tmp_path / 't.model'}: not the tokenizer file with which ")


@pytest.mark.parametrize(
    ("config", "ids", "own", "wanted"),
    [
        ({"eos_token_id": [6, 7]}, {"eos_token_id": 7}, False, [6, 7]),
        ({"eos_token_id": [6, 7]}, {"eos_token_id": 2}, False, 2),
        ({"eos_token_id": [6, 7]}, {"eos_token_id": 2}, True, [6, 7]),
        ({"eos_token_id": 9}, {"eos_token_id": 2}, False, 2),
        ({"eos_token_id": None}, {"eos_token_id": 2}, True, 2),
        ({}, {}, False, "absent"),
    ],
)
def test_ids_are_those_of_the_model_unless_its_tokenizer_is_another(config, ids, own, wanted):
    origin = HuggingFaceOrigin(config=config)
    for written in origin.documents(tiny(), "F32", ids, own).values():
        assert written.get("eos_token_id", "absent") == wanted
    assert HuggingFaceOrigin(generation_config={"top_k": 3}).documents(tiny(), "F32", ids, own)[
        "generation_config.json"
    ] == {"top_k": 3, **ids}


def test_what_cannot_be_kept_is_told(tmp_path):
    hugging_face(tiny()).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    (tmp_path / "LICENSE").write_text("x" * 300_000)
    (tmp_path / "tokenizer_config.json").write_text("{")
    source = open_hugging_face(tmp_path)
    assert [line.removeprefix(f"{tmp_path}/").split(";")[0] for line in source.warnings] == [
        "README.md: not UTF-8 text",
        "LICENSE: larger than 262144 bytes",
        "tokenizer_config.json: not JSON (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1))",
    ]
    for template in (3, {"a": "b"}, [{"name": "x", "template": 1}], "x" * 300_000):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        with pytest.raises(InputError, match=r"tokenizer_config.json: its chat_template is"):
            read_chat_template(tmp_path)
    with captured_logs() as messages:
        files = hugging_face_files(source, source.model, "F32", None)
    assert (
        len(messages) == 1 and "written without a tokenizer: the source names none" in messages[0]
    )
    assert files.documents.keys() == {"config.json", "generation_config.json"}


def test_a_record_cannot_name_other_files():
    entry = {"texts": {"../x": "a", "README.md": 3, "LICENSE": "b"}, "config": [1], "folder": {}}
    assert HuggingFaceOrigin.recorded({"hugging_face": entry}).texts == {"LICENSE": "b"}
    assert HuggingFaceOrigin.recorded({"hugging_face": [1]}) == HuggingFaceOrigin()
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    for document in ({"config": {"x": deep}}, {"chat_template": deep}):
        with pytest.raises(InputError, match="nested in more than 100 levels"):
            HuggingFaceOrigin.recorded({"hugging_face": document})
    with pytest.raises(InputError, match=r"x: .*nested in more than 100 levels"):
        code_warnings({"x": deep}, "x")
