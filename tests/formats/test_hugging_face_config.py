"""config.json in both of transformers' forms: what is read, what is written, what is refused."""

from copy import deepcopy

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megagrow.common.json_text import read_json
from megagrow.errors import InputError
from megagrow.formats.hugging_face_config import (
    code_warnings,
    config_of,
    config_warnings,
    model_of,
    without_code,
)
from megagrow.model.rope import rotary_tables
from tests.helpers.hugging_face import LLAMA3, OLD, YARN, tiny

WITH_POSITIONS = OLD | {"max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "factor": 2.0}
OPEN = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}


@pytest.mark.parametrize(
    ("written", "theta", "scaling"),
    [
        ({"rope_scaling": LINEAR}, 123.0, LINEAR),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 123.0, LINEAR),
        ({"rope_scaling": LINEAR | {"type": "linear"}}, 123.0, LINEAR),
        ({"rope_parameters": LINEAR | {"rope_theta": 7.0}}, 7.0, LINEAR),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        ({"rope_scaling": LLAMA3, "rope_parameters": LINEAR}, 123.0, LLAMA3),
        ({"rope_scaling": OPEN | {"beta_fast": None}}, 123.0, OPEN | {"original": 256}),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 32}, 123.0, YARN),
        ({"rope_scaling": OPEN, "original_max_position_embeddings": 64}, 123.0, {"original": 64}),
    ],
)
def test_both_forms_are_read_as_transformers_reads_them(written, theta, scaling):
    model = model_of(WITH_POSITIONS | written, "x")
    assert model.rope_theta == theta
    found = None if model.rope_scaling is None else model.rope_scaling.given()
    if scaling and "original" in scaling:
        assert found["original_max_position_embeddings"] == scaling["original"]
    else:
        assert found == scaling
    theirs = LlamaConfig(**deepcopy(WITH_POSITIONS | written))  # it changes what it is given
    theirs.standardize_rope_params()  # as the model does
    given = {"rope_type": "default"} if found is None else found
    rope = {k: v for k, v in theirs.rope_parameters.items() if v is not None and k != "type"}
    assert rope == given | {"rope_theta": theta}


DYNAMIC = {"type": "dynamic", "factor": 3.0}


@pytest.mark.parametrize(
    ("written", "ignored"),
    [
        ({"rope_scaling": LINEAR | {"finetuned": True}}, "linear has no finetuned"),
        ({"rope_scaling": YARN | {"attn_factor": 0.3}}, "yarn has no attn_factor"),
        (
            {"rope_scaling": DYNAMIC | {"original_max_position_embeddings": 16}},
            "dynamic has no ori",
        ),
        ({"rope_scaling": DYNAMIC | {"alpha": 1.0, "mscale": 1.0}}, "dynamic has no alpha, mscale"),
        ({"rope_scaling": {"factor": 4.0}}, "default has no factor"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 64}, None),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, None),
        ({"rope_scaling": YARN | {"factor": None}}, None),
        ({"rope_scaling": YARN | {"truncate": None, "beta_fast": 9}}, None),
        ({"rope_scaling": YARN | {"attention_factor": 2}}, None),
        ({"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}}, None),
        ({"rope_scaling": {}, "rope_parameters": LLAMA3 | {"rope_theta": 7.0}}, None),
        ({"rope_scaling": None, "rope_theta": 500.0, "original_max_position_embeddings": 9}, None),
    ],
)
def test_a_configs_positions_have_the_bits_of_transformers(written, ignored):
    config = OLD | {"max_position_embeddings": 48, "head_dim": 32} | written
    warnings = config_warnings(config, "x")
    assert len(warnings) == bool(ignored)
    assert not ignored or f"x: rope_type {ignored}" in warnings[0]
    theirs = LlamaRotaryEmbedding(LlamaConfig(**deepcopy(config)))
    for length in (20, 90):
        positions = torch.arange(length)[None]
        expected = theirs(torch.zeros(1), positions)
        found = rotary_tables(model_of(config, "x"), positions)
        for ours, wanted in zip(found, expected, strict=True):
            assert torch.equal(ours.squeeze(2), wanted)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_type 'longrope' is not one of default, lin",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'rope_scaling.factor'"),
        (
            {"rope_scaling": OPEN, "max_position_embeddings": None},
            "yarn requires original_max_position_embeddings",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling should be a mapping"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "of a layer type (full_attention)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5, only 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ],
)
def test_positions_that_are_not_known_are_refused(changes, said):
    with pytest.raises(InputError, match=r"^x: ") as error:
        model_of(WITH_POSITIONS | changes, "x")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3, YARN])
def test_what_is_written_is_read_back(scaling):
    model = tiny(rope_scaling=scaling)
    written = config_of(model, "F32", {})
    assert model_of(written, "x") == model
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    assert model_of(new, "x") == model_of(old, "x") == model


def test_the_rest_of_a_config_stays_but_for_what_names_code():
    like = {"bos_token_id": 7, "auto_map": {"AutoModel": "evil.Model"}, "architectures": ["Evil"]}
    written = config_of(tiny(), "BF16", like)
    assert written["bos_token_id"] == 7 and written["dtype"] == "bfloat16"
    assert written["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in written


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("attention_bias", True), ("mlp_bias", True), ("is_causal", False), ("qk_norm", True)),
        *(("layer_types", ["full_attention", "sliding_attention"]), ("sliding_window", 32)),
        *(("logit_scale", 0.5), ("residual_multiplier", 0.2), ("final_logit_softcapping", 30.0)),
        *(("num_local_experts", 8), ("quantization_config", {"bits": 4}), ("rotary_pct", 0.25)),
        *(("per_layer_config", [{"head_dim": 4}]), ("transformers_weights", "x.safetensors")),
        ("no_rope_layers", [1, 0]),
    ],
)
def test_a_key_with_an_effect_that_is_not_modelled_is_refused(key, value):
    with pytest.raises(InputError, match=rf"^x: {key} = ") as error:
        model_of(OLD | {key: value}, "x")
    assert repr(value) in str(error.value)


def test_keys_without_an_effect_are_accepted():
    harmless = {
        **{"pretraining_tp": 2, "use_cache": False, "hidden_act": "swish", "attention_bias": None},
        **{"num_experts": 0, "logit_scale": 1, "layer_types": ["full_attention"] * 2},
        **{"sliding_window": 32, "use_sliding_window": False, "unknown": {"key": [1]}},
    }
    model = model_of(OLD | harmless, "x")
    assert model == model_of(OLD, "x") and config_warnings(OLD | harmless, "x") == []
    written = config_of(model, "F32", OLD | harmless)
    assert written["pretraining_tp"] == 2 and written["unknown"] == {"key": [1]}
    assert not {"layer_types", "sliding_window"} & written.keys()
    assert config_warnings(OLD | {"attention_dropout": 0.1}, "x") == [
        "x: attention_dropout = 0.1, but megagrow trains without dropout"
    ]


def test_keys_that_run_code_are_dropped_at_any_depth():
    document = {
        "custom_pipelines": {"a": {"impl": "evil.Evil"}},
        "text": [{"auto_map": {}, "kept": 1}],
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "sdpa",
    }
    assert without_code(document) == {"text": [{"kept": 1}], "attn_implementation": "sdpa"}
    (line,) = code_warnings(document, "x")
    assert line.startswith("x: dropped keys ")
    assert line.endswith(": _attn_implementation, auto_map, custom_pipelines")
    assert code_warnings(without_code(document), "x") == []


def test_json_that_is_no_object_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"config.json: must contain a JSON object"):
        read_json(tmp_path / "config.json")
