"""config.json in both of transformers' forms: what is read, what is written, what is refused."""

from copy import deepcopy

import pytest
from transformers import LlamaConfig

from megagrow.errors import InputError
from megagrow.formats.hugging_face_config import config_of, generation_of, model_of, read_json
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_type 'longrope' is not one of default, lin",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'rope_scaling.factor'"),
        ({"rope_scaling": LINEAR | {"finetuned": True}}, "'rope_scaling.finetuned'"),
        (
            {"rope_scaling": OPEN, "max_position_embeddings": None},
            "yarn requires original_max_position_embeddings",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling should be a mapping"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            "original_max_position_embeddings is 64 and 32; keep one",
        ),
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


def test_generation_config_keeps_its_origin_and_takes_the_tokenizers_ids():
    origin = {"generation_config": {"temperature": 0.6, "eos_token_id": 9}}
    assert generation_of(origin, {"eos_token_id": 2}) == {"temperature": 0.6, "eos_token_id": 2}
    assert generation_of(None, {}) == generation_of({"generation_config": None}, {}) == {}


def test_json_that_is_no_object_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match=r"config.json: must contain a JSON object"):
        read_json(tmp_path / "config.json")
