"""The model of one device is Hugging Face's Llama, to the last gradient."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megagrow.model.decoder import CausalLM
from tests.helpers.hugging_face import hugging_face, outcome, tiny, tokens

HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
EXACT = 1e-5


def ours(theirs, config, recompute: str = "none") -> CausalLM:
    model = CausalLM(config, recompute)
    model.load_state_dict(theirs.state_dict())
    return model


def positions(batch: int, length: int) -> torch.Tensor:
    return torch.arange(length).expand(batch, length)


class CountCalls(TorchDispatchMode):
    """Count the operations within the context by name; attention is `attention`."""

    def __init__(self, calls: Counter) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_attention = "scaled_dot_product" in name and "backward" not in name
        self.calls["attention" if is_attention else name] += 1
        return func(*args, **(kwargs or {}))


def gradients(model, ids, labels, documents=None) -> tuple[torch.Tensor, dict]:
    logits = model(ids, positions(*ids.shape), documents)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("heads", HEADS)
def test_logits_and_gradients_are_hugging_faces(heads, tied):
    config = tiny(num_key_value_heads=HEADS[heads], tie_word_embeddings=tied)
    theirs = hugging_face(config)
    ids, labels = tokens(config, 3, 16)
    logits, expected = outcome(theirs, ids, labels)
    found_logits, found = gradients(ours(theirs, config), ids, labels)
    assert (found_logits - logits).abs().max() < EXACT
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < EXACT, name
        assert gradient.abs().max() > 100 * EXACT, f"{name}: the test would prove nothing"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_names_and_shapes_are_hugging_faces(tied):
    config = tiny(num_key_value_heads=2, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = CausalLM(config)
    expected = {name: p.shape for name, p in hugging_face(config).named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == expected
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_packed_documents_are_each_document_alone():
    config = tiny(num_key_value_heads=2)
    model = ours(hugging_face(config), config)
    lengths = (5, 1, 10)
    ids, _ = tokens(config, 1, sum(lengths))
    alone = [model(part, positions(*part.shape)) for part in ids.split(lengths, dim=1)]
    restarted = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.repeat_interleave(torch.tensor(lengths))[None]
    packed = model(ids, restarted, documents)
    assert (packed - torch.cat(alone, dim=1)).abs().max() < EXACT
    # Attention sees distances only: without the reset of positions, up to rounding, the same.
    assert (model(ids, positions(*ids.shape), documents) - packed).abs().max() < 10 * EXACT
    assert (model(ids, restarted) - packed).abs().max() > 0.1, "the mask changed nothing"


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(recompute, packed):
    check_recomputation(tiny(num_key_value_heads=2), recompute, packed)


def check_recomputation(config, recompute, packed):
    theirs = hugging_face(config)
    ids, labels = tokens(config, 2, 12)
    documents = torch.arange(12).div(5, rounding_mode="floor").expand(2, 12) if packed else None
    logits, expected = gradients(ours(theirs, config), ids, labels, documents)
    found_logits, found = gradients(ours(theirs, config, recompute), ids, labels, documents)
    assert torch.equal(found_logits, logits)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_selective_recomputation_repeats_no_product():
    """It repeats two norms of each of two layers, and SwiGLU."""
    config = tiny()
    theirs = hugging_face(config)
    ids, labels = tokens(config, 1, 4)
    counts = {}
    for recompute in ("none", "selective", "full"):
        model, calls = ours(theirs, config, recompute), Counter()
        with CountCalls(calls):
            gradients(model, ids, labels)
        counts[recompute] = calls
    products = {name: calls["mm"] for name, calls in counts.items()}
    assert products["none"] == products["selective"] < products["full"]
    attention = {name: calls["attention"] for name, calls in counts.items()}
    assert attention == {"none": 2, "selective": 2, "full": 4}
    again = counts["selective"] - counts["none"]
    assert again["silu"] == 2 and again["rsqrt"] == 4
