"""Scaled rotary positions are transformers' own, within the original length and far beyond it."""

import pytest
import torch

from megagrow.model.decoder import CausalLM
from megagrow.model.rope import frequencies
from tests.helpers.hugging_face import hugging_face, tiny, tokens

ORIGINAL, LONG = 32, 200
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn, all keys": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "attention_factor": 1.25,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
}
WIDE_HEADS = {"hidden_size": 64, "num_attention_heads": 2, "rope_theta": 500.0}
"""16 pairs: some in every range that llama3 and yarn tell apart."""


def positions(length: int) -> torch.Tensor:
    return torch.arange(length)[None]


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [ORIGINAL // 2, LONG])
def test_logits_are_transformers(name, length):
    most = ORIGINAL if name == "dynamic" else LONG
    config = tiny(rope_scaling=SCALINGS[name], max_position_embeddings=most, **WIDE_HEADS)
    theirs = hugging_face(config).eval()
    ids, _ = tokens(config, 1, length)
    with torch.no_grad():
        expected = theirs(ids).logits
        model = CausalLM(config)
        model.load_state_dict(theirs.state_dict())
        assert (model(ids, positions(length)) - expected).abs().max() < 1e-5
        plain = CausalLM(config.model_copy(update={"rope_scaling": None}))
        plain.load_state_dict(theirs.state_dict())
        moved = (plain(ids, positions(length)) - expected).abs().max()
    if name == "dynamic" and length < ORIGINAL:
        assert moved < 1e-5
    else:
        assert moved > 1e-3, "the test would prove nothing"


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_have_transformers_bits(name):
    config = tiny(rope_scaling=SCALINGS[name], max_position_embeddings=LONG, **WIDE_HEADS)
    theirs = hugging_face(config).model.rotary_emb
    assert torch.equal(frequencies(config, positions(8)), theirs.inv_freq)


def test_plain_frequencies_have_transformers_bits():
    config = tiny(**WIDE_HEADS)
    theirs = hugging_face(config).model.rotary_emb
    assert torch.equal(frequencies(config, positions(8)), theirs.inv_freq)


def test_positions_that_start_again_do_not_stretch_dynamic():
    scaling = SCALINGS["dynamic"]
    config = tiny(rope_scaling=scaling, max_position_embeddings=ORIGINAL, **WIDE_HEADS)
    packed = torch.arange(ORIGINAL).repeat(3)[None]
    plain = config.model_copy(update={"rope_scaling": None})
    assert torch.equal(frequencies(config, packed), frequencies(plain, packed))
