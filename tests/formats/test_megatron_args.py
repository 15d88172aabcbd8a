"""Megatron-LM's arguments: which models they describe, and which are refused."""

import argparse

import pytest

from megagrow.errors import InputError
from megagrow.formats.megatron_args import args_of, model_of
from megagrow.formats.megatron_layout import check_fits
from tests.helpers.formats.megatron_args import ARGS
from tests.helpers.hugging_face import tiny


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"swiglu": False}, "swiglu = False, only True is supported"),
        ({"normalization": "LayerNorm"}, "normalization = 'LayerNorm'"),
        ({"use_rotary_position_embeddings": False, "position_embedding_type": "none"}, "'none'"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"rotary_percent": 0.5}, "rotary_percent = 0.5"),
        ({"num_attention_heads": 3}, "not divisible"),
        ({"num_layers": None}, "'num_hidden_layers'"),
        ({"qk_layernorm": True}, "qk_layernorm = True, only False"),
        ({"softmax_type": "off-by-one"}, "softmax_type = 'off-by-one'"),
        ({"window_size": (128, 0)}, "window_size = (128, 0)"),
    ],
)
def test_models_that_are_no_plain_llama_are_refused(changes, said):
    args = argparse.Namespace(**ARGS | {"vocab_size": 101} | changes)
    with pytest.raises(InputError, match=r"^x: ") as error:
        model_of(args, "x")
    assert said in str(error.value)


OTHERS = [
    *({"model_type": name} for name in ("qwen2", "qwen3", "olmo2", "samba")),
    *({"attention_bias": True}, {"qk_norm": "per_head"}, {"norm_position": "post"}),
    *({"sliding_window": 8}, {"model_type": "mistral", "sliding_window": 8}),
]


@pytest.mark.parametrize("keys", OTHERS)
def test_features_besides_those_of_llama_are_refused_by_key(keys):
    model = tiny(**keys)
    for use in (lambda: args_of(model, 1, 8, 104), lambda: check_fits(model, [{}], "x")):
        with pytest.raises(InputError, match=r"^model\.(\w+) = .*: megagrow supports") as error:
            use()
        assert "\n" not in str(error.value)


def test_a_mistral_without_a_window_is_a_llama_there():
    assert args_of(tiny(model_type="mistral"), 1, 8, 104) == args_of(tiny(), 1, 8, 104)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_rope_scaling_is_kept_where_both_have_it():
    model = tiny(rope_scaling=LLAMA3)
    args = args_of(model, 1, 8, 104)
    assert args.use_rope_scaling and args.rope_scaling_factor == 4.0
    assert model_of(args, "x") == model
    for other in (LLAMA3 | {"high_freq_factor": 8.0}, {"rope_type": "linear", "factor": 2.0}):
        with pytest.raises(InputError, match=r"rope_scaling .*: Megatron-LM supports only"):
            args_of(tiny(rope_scaling=other), 1, 8, 104)
    assert not args_of(tiny(), 1, 8, 104).use_rope_scaling
