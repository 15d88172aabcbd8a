"""Models go to transformers and come back: the same bits, the same logits, and they generate."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from megagrow.checkpoint.manifest import read_manifest
from megagrow.checkpoint.source import open_checkpoint
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.data.tokenizers import load_tokenizer
from megagrow.errors import InputError
from megagrow.formats.hugging_face import open_hugging_face
from megagrow.offline.convert import export_hugging_face, import_hugging_face, reshard_files
from megagrow.offline.request import Request
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.checkpoint.written import (
    differences,
    expected_shards,
    set_environment,
    shards,
    write_checkpoint,
)
from tests.helpers.hugging_face import LLAMA3, hugging_face, state_of, tiny, tokens
from tests.helpers.logs import captured_logs
from tests.helpers.reshard.models import layout_of
from tests.helpers.train.file_growths import grow, model_file

MODELS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mha, tied": {"tie_word_embeddings": True},
    "gqa, tied, llama3": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA3,
    },
}
EXACT = 1e-5


def convert(how: Any, source: Path, out: Path, form: str = "checkpoint", **options: Any) -> str:
    """Run a conversion; returns its output and log messages."""
    output = io.StringIO()
    request = Request(source=source, out=out, form=form, memory="20MiB", **options)
    with captured_logs() as messages:
        how(request, Console(file=output, width=300))
    return "\n".join([*messages, output.getvalue()])


def export(source: Path, out: Path, **options: Any) -> str:
    return convert(export_hugging_face, source, out, "huggingface", **options)


def load(folder: Path) -> Any:
    """Their model of a folder; fails if a weight is missing or has no place."""
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()), told
    return model.eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_from_a_checkpoint_with_a_padded_vocabulary(tmp_path, name):
    config = tiny(**MODELS[name])
    theirs = hugging_face(config).eval()
    layout = layout_of(config, 2, 2, 2)
    assert layout.plan["model.embed_tokens.weight"].padded_rows > config.vocab_size
    state = state_of(theirs, parameter_plan(config, 1))
    write_checkpoint(tmp_path / "in", config, layout, state)
    said = export(tmp_path / "in", tmp_path / "hf", shard_size="20KB")
    assert "without a tokenizer: the source names none; add one with --tokenizer PATH" in said
    loaded = load(tmp_path / "hf")
    ids, _ = tokens(config, 2, 24)
    assert (logits(loaded, ids) - logits(theirs, ids)).abs().max() < EXACT
    made = loaded.generate(ids[:1, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 9) and torch.equal(made[:, :4], ids[:1, :4])
    again = theirs.generate(
        ids[:1, :4], max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(made, again)
    convert(import_hugging_face, tmp_path / "hf", tmp_path / "back", zero_stage=2, dp=2, tp=2)
    for kinds in state.values():
        kinds["exp_avg"].zero_()
        kinds["exp_avg_sq"].zero_()
    wanted = expected_shards(open_checkpoint(tmp_path / "back").layout, state)
    assert differences(shards(tmp_path / "back"), wanted) == []
    manifest = read_manifest(tmp_path / "back")
    assert manifest.model == config.model_dump() and manifest.adam_step == 0
    assert manifest.run["counters"]["step"] == manifest.run["stage"] == 0


@pytest.mark.parametrize("name", ["mha", "gqa, tied, llama3"])
def test_a_model_of_theirs_is_imported_grown_and_exported(tmp_path, name):
    config = tiny(**MODELS[name])
    theirs = hugging_face(config).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    convert(import_hugging_face, tmp_path / "hf", tmp_path / "in", zero_stage=3, dp=3, tp=1)
    to = model_file(tmp_path / "m.yaml", config.model_dump() | {"num_hidden_layers": 4})
    grow(source=tmp_path / "in", out=tmp_path / "grown", to=to, operators=("zero_depth",))
    export(tmp_path / "grown", tmp_path / "out", shard_size="20KB")
    loaded = load(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 4
    ids, _ = tokens(config, 2, 24)
    assert (logits(loaded, ids) - logits(theirs, ids)).abs().max() < EXACT


def test_a_checkpoint_takes_another_layout_with_all_its_state(tmp_path):
    config = tiny(num_key_value_heads=2)
    state = state_of(hugging_face(config), parameter_plan(config, 1))
    path = write_checkpoint(tmp_path / "in", config, layout_of(config, 1, 2, 2), state)
    layout = {"zero_stage": 3, "dp": 3, "tp": 1, "weight_decay_on": "matrices"}
    convert(reshard_files, path, tmp_path / "out", **layout)
    source = open_checkpoint(tmp_path / "out")
    assert (source.layout.zero_stage, source.layout.dp, source.layout.tp) == (3, 3, 1)
    assert differences(shards(tmp_path / "out"), expected_shards(source.layout, state)) == []
    before, after = read_manifest(path), read_manifest(tmp_path / "out")
    assert (after.adam_step, after.run) == (before.adam_step, source.run)
    assert after.run["counters"]["tokens"] == before.run["counters"]["tokens"]
    assert after.environment == before.environment


def test_what_a_folder_said_goes_through_a_checkpoint(tmp_path):
    theirs = hugging_face(tiny())
    theirs.config.bos_token_id, theirs.config.eos_token_id = 5, [6, 7]
    theirs.generation_config.eos_token_id, theirs.generation_config.max_length = [6, 7], 9
    theirs.save_pretrained(tmp_path / "hf")
    convert(import_hugging_face, tmp_path / "hf", tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out", dtype="bfloat16")
    loaded = load(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (5, [6, 7])
    assert loaded.generation_config.eos_token_id == [6, 7]
    assert loaded.generation_config.max_length == 9


def test_no_special_token_is_made_up(tmp_path):
    config = tiny()
    state = state_of(hugging_face(config), parameter_plan(config, 1))
    export(
        write_checkpoint(tmp_path / "in", config, layout_of(config, 0, 1, 1), state),
        tmp_path / "out",
    )
    loaded = load(tmp_path / "out")
    assert loaded.config.bos_token_id is loaded.config.eos_token_id is None
    assert loaded.generation_config.eos_token_id is None


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    train_sentencepiece(["a small model grows into a large one\n" * 20], 280, tmp_path / "t.model")
    return tmp_path / "t.model"


def of_run(folder: Path, tokenizer: Path | None) -> Path:
    """A checkpoint whose run names a tokenizer."""
    config = tiny(vocab_size=301)
    state = state_of(hugging_face(config), parameter_plan(config, 1))
    path = write_checkpoint(folder / "in", config, layout_of(config, 1, 1, 1), state)
    told = {"config": {"data": {"tokenizer": str(tokenizer)}}}
    set_environment(path, told)
    return path


def test_the_tokenizer_of_the_run_goes_with_it(tmp_path, tokenizer):
    path = of_run(tmp_path, tokenizer)
    said = export(path, tmp_path / "out")
    assert "without a tokenizer" not in said
    model, theirs = load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "a model grows\n  and grows"
    assert [theirs(text)["input_ids"]] == load_tokenizer(tokenizer).encode_batch([text])
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert model.generation_config.eos_token_id == theirs.eos_token_id == 2
    made = model.generate(**theirs(text, return_tensors="pt"), max_new_tokens=3, pad_token_id=0)
    assert theirs.decode(made[0]).startswith(text)


def test_a_tokenizer_that_is_gone_is_told_and_one_given_taken(tmp_path, tokenizer):
    path = of_run(tmp_path, tmp_path / "gone.model")
    said = export(path, tmp_path / "out")
    gone = tmp_path / "gone.model"
    assert f"without a tokenizer: {gone}, named by the source, does not exist" in said
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    export(path, tmp_path / "with", tokenizer=str(tokenizer))
    assert AutoTokenizer.from_pretrained(tmp_path / "with").eos_token_id == 2
    with pytest.raises(InputError, match=r"none: no tokenizer"):
        export(path, tmp_path / "not", tokenizer=str(tmp_path / "none"))
    assert not (tmp_path / "not").exists()


def test_the_wrong_kind_of_source_is_named(tmp_path):
    config = tiny()
    hugging_face(config).save_pretrained(tmp_path / "hf")
    state = state_of(hugging_face(config), parameter_plan(config, 1))
    path = write_checkpoint(tmp_path / "in", config, layout_of(config, 0, 1, 1), state)
    with pytest.raises(
        InputError, match="is a Hugging Face folder; use megagrow convert hf-import"
    ):
        convert(reshard_files, tmp_path / "hf", tmp_path / "out")
    with pytest.raises(InputError, match=r"not a Hugging Face folder, it has no config.json"):
        convert(import_hugging_face, path, tmp_path / "out")
    with pytest.raises(InputError, match=r"--tp 3 does not divide num_attention_heads = 4"):
        convert(reshard_files, path, tmp_path / "out", tp=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "..", "a/b.safetensors", ""]
)
def test_an_index_can_not_reach_out_of_its_folder(tmp_path, name):
    folder = tmp_path / "hf"
    hugging_face(tiny()).save_pretrained(folder, max_shard_size="20KB")
    (tmp_path / "other.safetensors").write_bytes(b"secret")
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(told))
    with pytest.raises(InputError, match="is not the name of a file in its folder") as error:
        open_hugging_face(folder)
    assert repr(name) in str(error.value)


def test_a_folders_code_is_never_run(tmp_path):
    folder = tmp_path / "hf"
    hugging_face(tiny()).save_pretrained(folder)
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w').close()\nclass Evil: pass\n"
    for name in ("configuration_evil.py", "modeling_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(trap)
    told = json.loads((folder / "config.json").read_text())
    told["auto_map"] = {"AutoConfig": "configuration_evil.Evil"}
    told["auto_map"]["AutoModelForCausalLM"] = "modeling_evil.Evil"
    told["trust_remote_code"] = True
    (folder / "config.json").write_text(json.dumps(told))
    convert(import_hugging_face, folder, tmp_path / "in")
    export(folder, tmp_path / "out")
    export(tmp_path / "in", tmp_path / "again")
    assert not (tmp_path / "sprung").exists()
    assert not [name for name in sys.modules if name.endswith("_evil")]
    for made in (tmp_path / "out", tmp_path / "again"):
        written = json.loads((made / "config.json").read_text())
        assert not {"auto_map", "trust_remote_code"} & written.keys()
        assert not list(made.rglob("*.py"))
