"""config.json of every family is read as its class in transformers reads it, and written for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megagrow.errors import InputError
from megagrow.formats.hugging_face import open_hugging_face
from megagrow.formats.hugging_face_config import config_of, model_of
from megagrow.formats.hugging_face_families import FAMILIES, READ_KEYS, export_problems
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.families import FAMILIES as MODELS
from tests.helpers.families import of_family
from tests.helpers.hugging_face import hugging_face, state_of, tiny, tokens
from tests.helpers.reshard.models import layout_of
from tests.helpers.train.file_growths import grow

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 32,
    "intermediate_size": 48,
    "vocab_size": 101,
}


def layer_types(model: Any) -> list[str]:
    return [model.layer_type(layer) for layer in range(model.num_hidden_layers)]


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_class(name):
    model = model_of(SIZES | {"model_type": name}, "x")
    theirs = AutoConfig.for_model(name, **SIZES)
    head_dim = getattr(theirs, "head_dim", 2)
    expected = {key: getattr(theirs, key) for key in READ_KEYS if key != "head_dim"}
    assert {key: getattr(model, key) for key in expected} == expected
    assert model.head_dim == head_dim and model.rope_theta == theirs.rope_parameters["rope_theta"]
    assert model.sliding_window == getattr(theirs, "sliding_window", None)
    assert model.model_type == name


ON = {"use_sliding_window": True}
MIXED = ["sliding_attention", "full_attention", "full_attention"]


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "keys",
    [
        ON | {"sliding_window": 8, "max_window_layers": 2},
        ON | {"sliding_window": 8, "max_window_layers": 0},
        ON | {"sliding_window": 8, "layer_types": MIXED, "max_window_layers": 1},
        ON | {"sliding_window": 8},
        ON | {"sliding_window": None, "max_window_layers": 0},
        {"sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    ],
)
def test_windows_of_qwen_are_those_of_the_class(name, keys):
    model = model_of(SIZES | keys | {"model_type": name}, "x")
    theirs = AutoConfig.for_model(name, **SIZES, **json.loads(json.dumps(keys)))
    assert layer_types(model) == theirs.layer_types
    slides = "sliding_attention" in theirs.layer_types
    assert model.sliding_window == (theirs.sliding_window if slides else None)
    written = config_of(model, "F32", {})
    assert model_of(written, "x") == model
    older = {key: value for key, value in written.items() if key != "layer_types"}
    assert (model_of(older, "x") == model) == ("layer_types" not in keys)


@pytest.mark.parametrize("window", [None, 8])
def test_windows_of_mistral_are_in_all_layers(window):
    model = model_of(SIZES | {"model_type": "mistral", "sliding_window": window}, "x")
    kind = "full_attention" if window is None else "sliding_attention"
    assert (layer_types(model), model.sliding_window) == ([kind] * 3, window)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        *((name, {"attention_bias": True}, "attention_bias = True, only False") for name in FAMILIES
          if name != "qwen2"),
        ("mistral", {"layer_types": MIXED}, "only 'sliding_attention' is supported"),
        ("mistral", {"sliding_window": None, "layer_types": MIXED}, "only 'full_attention' is"),
        ("mistral", {"sliding_window": 0}, "'sliding_window'"),
        ("olmo2", {"sliding_window": 8}, "sliding_window = 8, only null is supported"),
        ("olmo2", {"layer_types": MIXED}, "only 'full_attention' is supported"),
        ("qwen2", {"layer_types": MIXED}, "only 'full_attention' is supported"),
        ("qwen3", ON | {"layer_types": ["mamba"]}, "only 'full_attention' or 'sliding_att"),
        ("qwen3", ON | {"layer_types": MIXED[:2]}, "has 2 entries, which do not divide"),
        ("qwen3", ON | {"max_window_layers": "2"}, "max_window_layers = '2', only an integer"),
        ("qwen3", {"num_hidden_layers": 10**12}, "'num_hidden_layers'"),
        ("qwen3", {"num_hidden_layers": "3"} | ON, "'layer_types'"),
    ],
)  # fmt: skip
def test_what_the_class_or_megagrow_does_not_have_is_refused(name, keys, message):
    with pytest.raises(InputError, match=r"^x: ") as error:
        model_of(SIZES | {"model_type": name} | keys, "x")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_key_that_the_class_always_has_is_accepted():
    keys = {"model_type": "qwen2", "attention_bias": True}
    assert model_of(SIZES | keys, "x") == model_of(SIZES | {"model_type": "qwen2"}, "x")


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_becomes_a_folder_of_its_class(tmp_path, name):
    config = of_family(name, tie_word_embeddings=name == "qwen3")
    theirs = hugging_face(config).eval()
    state = state_of(theirs, parameter_plan(config, 1))
    write_checkpoint(tmp_path / "in", config, layout_of(config, 3, 2, 2), state)
    grow(source=tmp_path / "in", out=tmp_path / "out", form="huggingface", to=None)
    loaded, problems = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(problems.values()), problems
    assert type(loaded) is type(theirs) and loaded.config.pad_token_id is None
    ids, _ = tokens(config, 2, 16)
    assert torch.equal(loaded.eval()(ids).logits, theirs(ids).logits)
    assert open_hugging_face(tmp_path / "out").model == config


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "qwen3",
            ("model.layers.1.self_attn.q_norm.weight", None),
            "do not contain model.layer",
        ),
        ("qwen2", ("model.layers.0.self_attn.k_proj.bias", None), "do not contain model.layer"),
        ("olmo2", ("model.layers.0.input_layernorm.weight", 32), "which the Olmo2ForCausalLM of"),
        ("mistral", ("model.layers.0.self_attn.o_proj.bias", 32), "which the MistralForCausalLM"),
        ("olmo2", ("model.layers.0.self_attn.k_norm.weight", 8), "config.json requires [16]"),
    ],
)
def test_missing_and_further_tensors_are_refused(tmp_path: Path, name, change, message):
    hugging_face(of_family(name)).save_pretrained(tmp_path)
    tensors, (tensor, size) = load_file(tmp_path / "model.safetensors"), change
    tensors.pop(tensor, None)
    tensors |= {} if size is None else {tensor: torch.ones(size)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as error:
        open_hugging_face(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


SLIDING = {"sliding_window": 8}
TWO_TYPES = ["full_attention", "sliding_attention"]
OTHERS: list[tuple[dict[str, Any], str, str]] = [
    ({"qk_norm": "per_head"}, "qk_norm = per_head", "LlamaForCausalLM; model_type = qwen3 fits"),
    ({"attention_bias": True}, "attention_bias = True", "LlamaForCausalLM; model_type = qwen2"),
    (SLIDING, "layer_types = ['sliding_attention']", "model_type = mistral fits"),
    ({"norm_position": "post"}, "norm_position = post", "no class of transformers fits"),
    ({"model_type": "qwen3", "qk_norm": None}, "qk_norm = None", "model_type = llama fits"),
    (
        {"model_type": "mistral", **SLIDING, "layer_types": TWO_TYPES},
        f"layer_types = {TWO_TYPES}",
        "MistralForCausalLM; no class of transformers fits",
    ),
    ({"model_type": "samba"}, "model_type = samba", "no class of this family; keep the"),
    (
        {"model_type": "samba", **SLIDING, "layer_types": ["sliding_attention"]},
        "model_type = samba",
        "no class of this family; model_type = mistral fits",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "value", "fix"), OTHERS)
def test_a_model_without_a_class_is_not_exported(keys, value, fix):
    (problem,) = export_problems(tiny(**keys))
    assert problem.startswith(f"model.{value}") and fix in problem and "\n" not in problem


def test_a_model_without_a_class_is_refused_before_anything_is_written(tmp_path):
    config = tiny(qk_norm="per_head")
    plan = parameter_plan(config, 1)
    state = state_of(hugging_face(of_family("qwen3", head_dim=8, num_key_value_heads=4)), plan)
    write_checkpoint(tmp_path / "in", config, layout_of(config, 1, 1, 1), state)
    with pytest.raises(InputError, match=r"^model.qk_norm = per_head .* model_type = qwen3 fits$"):
        grow(source=tmp_path / "in", out=tmp_path / "out", form="huggingface", to=None)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_guide_lists_every_family():
    guide = (Path(__file__).parents[2] / "docs/guides/conversion.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in guide.splitlines() if "ForCausalLM` |" in line]
    assert rows == [[f"| `{name}`", f"`{f.architecture}`"] for name, f in FAMILIES.items()]
