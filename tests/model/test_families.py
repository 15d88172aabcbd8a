"""Each family on one device is Hugging Face's model of its class, to the last gradient."""

import pytest
import torch

from tests.helpers.families import FAMILIES, of_family
from tests.helpers.hugging_face import hugging_face, outcome, tokens
from tests.model.test_decoder import check_recomputation, gradients, ours, positions

EXACT = 1e-5
CLASSES = {
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}

families = pytest.mark.parametrize("name", FAMILIES)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@families
def test_logits_and_gradients_are_hugging_faces(name, tied):
    config = of_family(name, tie_word_embeddings=tied)
    theirs = hugging_face(config)
    assert type(theirs).__name__ == CLASSES[name]
    ids, labels = tokens(config, 3, 16)
    logits, expected = outcome(theirs, ids, labels)
    found_logits, found = gradients(ours(theirs, config), ids, labels)
    assert (found_logits - logits).abs().max() < EXACT
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (found[parameter] - gradient).abs().max() < EXACT, parameter
        vanishes = parameter.endswith("k_proj.bias") and "layers.0" not in parameter
        assert vanishes or gradient.abs().max() > 100 * EXACT, f"{parameter}: proves nothing"


@families
def test_packed_documents_are_each_document_alone(name):
    config = of_family(name)
    theirs = hugging_face(config)
    model = ours(theirs, config)
    lengths = (5, 1, 10)
    ids, _ = tokens(config, 1, sum(lengths))
    alone = [theirs(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    restarted = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.repeat_interleave(torch.tensor(lengths))[None]
    packed = model(ids, restarted, documents)
    assert (packed - torch.cat(alone, dim=1)).abs().max() < EXACT
    assert (model(ids, restarted) - packed).abs().max() > 0.1, "the mask changed nothing"


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_window_limits_what_a_token_sees(name):
    config = of_family(name)
    theirs = hugging_face(config)
    ids, _ = tokens(config, 1, 16)
    wide = config.model_copy(update={"layer_types": ["full_attention"], "sliding_window": None})
    found, other = (ours(theirs, each)(ids, positions(1, 16)) for each in (config, wide))
    change = (found - other).abs().amax(dim=-1)[0]
    assert change[: config.sliding_window].max() < EXACT < 0.1 < change[-1]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
@families
def test_recomputation_changes_no_bit(name, recompute, packed):
    check_recomputation(of_family(name), recompute, packed)
