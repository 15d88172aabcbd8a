"""Models go to Hugging Face's folders and come from them; transformers computes the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megagrow.checkpoint.source import open_checkpoint
from megagrow.errors import InputError
from megagrow.formats.hugging_face import INDEX_FILE, open_hugging_face
from megagrow.formats.hugging_face_config import model_of
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.layout import Block
from tests.helpers.checkpoint.written import write_checkpoint, write_config
from tests.helpers.hugging_face import OLD, hugging_face, state_of, tiny, tokens
from tests.helpers.reshard.models import layout_of
from tests.helpers.train.file_growths import grow, model_file

MODELS = {
    "groups": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 12, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_becomes_a_folder_that_transformers_loads(tmp_path, name):
    config = tiny(**MODELS[name])
    theirs = hugging_face(config).eval()
    state = state_of(theirs, parameter_plan(config, 1))
    write_checkpoint(tmp_path / "in", config, layout_of(config, 3, 3, 1), state)
    grow(
        source=tmp_path / "in",
        out=tmp_path / "out",
        to=model_file(tmp_path / "m.yaml", config.model_dump()),
        form="huggingface",
        shard_size="20KB",
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == set(index["weight_map"].values()) and len(files) > 1
    size = sum(t.numel() * 4 for f in files for t in load_file(tmp_path / "out" / f).values())
    assert index["metadata"]["total_size"] == size
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids, _ = tokens(config, 2, 16)
    assert loaded.config.rope_parameters == {"rope_type": "default", "rope_theta": 5000.0}
    assert torch.equal(loaded.eval()(ids).logits, theirs(ids).logits)
    assert open_hugging_face(tmp_path / "out").model == config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_of_theirs_becomes_a_checkpoint(tmp_path, dtype):
    config = tiny(num_key_value_heads=2)
    theirs = hugging_face(config).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    to = model_file(tmp_path / "m.yaml", config.model_dump() | {"num_hidden_layers": 4})
    request: dict[str, Any] = {"source": tmp_path / "in", "to": to, "operators": ("zero_depth",)}
    grow(out=tmp_path / "out", form="checkpoint", zero_stage=1, dp=2, tp=2, **request)
    source = open_checkpoint(tmp_path / "out")
    assert source.layout.zero_stage == 1 and source.adam_step == 0
    assert source.run is not None and source.run["stage"] == 1
    found = theirs.float().state_dict()
    for name, spec in source.layout.plan.items():
        block = Block(range(spec.rows), range(spec.cols))
        for kind in ("exp_avg", "exp_avg_sq"):
            assert not source.read(name, kind, block).any()
        layer = spec.layer
        silent = layer in (1, 3) and name.endswith(("o_proj.weight", "down_proj.weight"))
        origin = name if layer is None else name.replace(f"layers.{layer}", f"layers.{layer // 2}")
        wanted = torch.zeros(()) if silent else found[origin].view(spec.rows, spec.cols)
        assert (source.read(name, "fp32", block) == wanted).all(), name
    # Theirs to theirs: what their config says besides stays.
    write_config(tmp_path / "in", bos_token_id=77)
    grow(out=tmp_path / "again", dtype="bfloat16", **request)
    config_again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config_again["bos_token_id"] == 77 and config_again["dtype"] == "bfloat16"
    (file,) = (tmp_path / "again").glob("*.safetensors")
    assert file.name == "model.safetensors"
    stored = load_file(file)["model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(stored, found["model.layers.0.self_attn.k_proj.weight"].bfloat16())


def test_a_config_of_transformers_4_is_read_with_its_defaults():
    model = model_of(OLD | {"head_dim": None, "rope_scaling": None}, "x")
    assert model.rope_theta == 123.0 and model.rms_norm_eps == 1e-6
    assert model.num_key_value_heads == 4 and model.head_dim == 8
    assert not model.tie_word_embeddings and model.max_position_embeddings == 2048


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gemma"}, "model_type = 'gemma', supported are llama, mistral, qwen2"),
        ({"model_type": ["llama"]}, "model_type = ['llama'], supported are"),
        ({"attention_bias": True}, "attention_bias = True, only False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_attention_heads": 5}, "hidden_size = 32 is not divisible by"),
        ({"hidden_size": "wide"}, "'hidden_size'"),
    ],
)
def test_models_of_other_families_and_features_are_refused(changes, said):
    with pytest.raises(InputError, match=r"^x: ") as error:
        model_of(OLD | changes, "x")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    hugging_face(tiny()).save_pretrained(tmp_path / "in", max_shard_size="20KB")
    return tmp_path / "in"


def rewrite(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index[name]
    found = load_file(file)
    del found[name]
    save_file(found | ({} if tensor is None else {name: tensor}), file)


def whole(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Any:
    """Put a tiny model into one file of a folder, changed; returns our source of it."""
    hugging_face(tiny(**config)).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return open_hugging_face(folder)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
HEADS = {
    "differs": lambda held: held.update({HEAD: held[EMBEDDING].flip(0)}),
    "repeats": lambda held: held.update({HEAD: held[EMBEDDING].clone()}),
    "alone": lambda held: held.update({HEAD: held.pop(EMBEDDING)}),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_beside_a_tied_embedding_is_what_transformers_loads(tmp_path, name):
    source = whole(tmp_path, HEADS[name], tie_word_embeddings=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert source.model.tie_word_embeddings == (name != "differs")
    assert any("tie_word_embeddings = true, but" in line for line in source.warnings) == (
        name == "differs"
    )
    wanted = {EMBEDDING: theirs.get_input_embeddings(), HEAD: theirs.get_output_embeddings()}
    for parameter, module in wanted.items():
        spec = source.layout.plan.get(parameter, source.layout.plan[EMBEDDING])
        block = Block(range(spec.rows), range(spec.cols))
        assert torch.equal(source.read(spec.name, "fp32", block), module.weight)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.mlp.up_proj.weight_scale",
        "score.weight",
    ],
)
def test_a_tensor_that_would_not_be_read_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=rf"model.safetensors: contains {name}, which the Llama"):
        whole(tmp_path, lambda held: held.update({name: torch.ones(2)}))


def test_position_tables_of_old_versions_are_no_weights(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert whole(tmp_path, lambda held: held.update({name: torch.ones(4)})).warnings == ()


def test_a_stale_index_beside_a_whole_file_is_ignored_as_in_transformers(folder, tmp_path):
    hugging_face(tiny(), seed=7).save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").rename(folder / "model.safetensors")
    source, theirs = open_hugging_face(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert source.files == (folder / "model.safetensors",)
    assert source.warnings == (f"{folder / INDEX_FILE} is ignored: model.safetensors exists",)
    block = Block(range(101), range(32))
    assert torch.equal(source.read(HEAD, "fp32", block), theirs.lm_head.weight)


def test_what_would_change_the_weights_is_refused(folder):
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    with pytest.raises(InputError, match=rf"{second.name}: contains {name}, as does {first.name}"):
        open_hugging_face(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter_config.json: transformers would add this"):
        open_hugging_face(folder)


def test_a_folder_that_does_not_hold_its_model_is_named(folder):
    name = "model.norm.weight"
    rewrite(folder, name, torch.ones(32, dtype=torch.int64))
    with pytest.raises(
        InputError, match=r"model.norm.weight has dtype I64, supported are F32, F16, BF16"
    ):
        open_hugging_face(folder)
    rewrite(folder, name, torch.ones(31))
    with pytest.raises(InputError, match=r"has shape \[31\], config.json requires \[32\]"):
        open_hugging_face(folder)
    rewrite(folder, name, None)
    with pytest.raises(InputError, match=r"its files do not contain model.norm.weight"):
        open_hugging_face(folder)
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"listed in its index, is missing"):
        open_hugging_face(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"has neither model.safetensors nor"):
        open_hugging_face(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: not JSON"):
        open_hugging_face(folder)
