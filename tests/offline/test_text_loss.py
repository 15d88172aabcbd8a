"""The loss on a text, read layer by layer, is that of the whole model."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megagrow.checkpoint.source import open_checkpoint
from megagrow.config.schema import ModelConfig
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.errors import InputError
from megagrow.model.decoder import CausalLM
from megagrow.offline.text_loss import text_loss, text_memory, text_tokens
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.reshard.definition import State, random_state
from tests.helpers.reshard.models import layout_of
from tests.helpers.train.file_growths import BASE, DEEP, base, grow, model_file

VOCABULARY = {"vocab_size": 300}
TEXT = "A model that is grown keeps what it knows; 12 times 3 is 36.\n" * 9


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    train_sentencepiece([TEXT], 290, path)
    return str(path)


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text").write_text(TEXT)
    return tmp_path / "text"


def checkpoint(path: Path, model: ModelConfig) -> tuple[Path, State]:
    """Weights small enough for a loss that is no extreme."""
    state = random_state(parameter_plan(model, 1))
    for kinds in state.values():
        kinds["fp32"] *= 0.2
    return write_checkpoint(path, model, layout_of(model, 3, 2, 2), state), state


def whole_loss(model: ModelConfig, state: State, sequences: list[torch.Tensor]) -> float:
    """By the whole model in memory."""
    whole = CausalLM(model)
    shapes = {name: p.shape for name, p in whole.named_parameters()}
    weights = {name: state[name]["fp32"].reshape(shape) for name, shape in shapes.items()}
    if model.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    whole.load_state_dict(weights)
    found = []
    with torch.no_grad():
        for ids in sequences:
            logits = whole(ids, torch.arange(ids.shape[1])[None])[0, :-1]
            found.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tie_word_embeddings": True},
        {"layer_types": ["mamba", "sliding_attention"], "sliding_window": 8},
        {"model_type": "olmo2", "attention_bias": True},
    ],
)
def test_it_is_that_of_the_whole_model(tmp_path, text, tokenizer, sizes):
    model = base(**sizes, **VOCABULARY)
    path, state = checkpoint(tmp_path / "in", model)
    sequences = text_tokens(text, tokenizer, (model,))
    assert len(sequences) > 3 and {s.shape[1] for s in sequences[:-1]} == {32}
    loss = text_loss(open_checkpoint(path), sequences)
    assert loss == pytest.approx(whole_loss(model, state, sequences), rel=1e-6)


def test_both_losses_are_told(tmp_path, text, tokenizer, monkeypatch):
    model = base(**VOCABULARY)
    path, state = checkpoint(tmp_path / "in", model)
    loss = whole_loss(model, state, text_tokens(text, tokenizer, (model,)))
    request = {
        "source": path,
        "to": model_file(tmp_path / "m.yaml", DEEP | VOCABULARY),
        "operators": ("zero_depth",),
        "text": text,
        "tokenizer": tokenizer,
    }
    assert f"source {loss:.4f}" in grow(out=tmp_path / "zero", **request)
    found = grow(out=tmp_path / "again", **request, form="huggingface").split("loss on the text: ")
    source, target = (float(part.split()[1]) for part in found[1].split(",")[:2])
    assert source == target == pytest.approx(loss, abs=1e-6)
    # Masks stand before what is random.
    random = request | {"operators": ("random_depth",)}
    assert f"target {loss:.4f}" in grow(out=tmp_path / "random", **random)
    stacked = grow(out=tmp_path / "stack", **request | {"operators": ("direct_depth",)})
    assert float(stacked.split("target ")[1].split()[0]) != pytest.approx(loss, abs=1e-3)
    # An exact operator that is not exact leaves nothing behind that looks like a checkpoint.
    losses = iter((1.0, 1.1))
    monkeypatch.setattr("megagrow.offline.grow.text_loss", lambda *_: next(losses))
    with pytest.raises(InputError, match=r"zero_depth must preserve .* from 1.000000 to 1.100000"):
        grow(out=tmp_path / "wrong", **request)
    assert not (tmp_path / "wrong").exists()


def test_what_keeps_a_loss_from_being_told(tmp_path, text, tokenizer):
    model = base(**VOCABULARY)
    path, _ = checkpoint(tmp_path / "in", model)
    request = {
        "source": path,
        "out": tmp_path / "out",
        "to": model_file(tmp_path / "m.yaml", DEEP | VOCABULARY),
        "tokenizer": tokenizer,
        "text": text,
    }
    with pytest.raises(InputError, match="gone: No such file"):
        grow(**request | {"text": tmp_path / "gone"})
    (tmp_path / "short").write_text("")
    with pytest.raises(InputError, match="short: 0 tokens; a loss needs at least 2"):
        grow(**request | {"text": tmp_path / "short"})
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="binary: not a UTF-8 text file"):
        grow(**request | {"text": tmp_path / "binary"})
    small, _ = checkpoint(tmp_path / "small", base())
    with pytest.raises(InputError, match="has 290 tokens, more than the model's vocab_size 37"):
        grow(**request | {"source": small, "to": model_file(tmp_path / "s.yaml", BASE)})
    assert not (tmp_path / "out").exists()


def test_memory_is_that_of_the_largest_layer():
    """Mamba layers have more weights and activations than attention here."""
    ids = [torch.zeros(1, 32)]
    types = [["full_attention"], ["mamba", "full_attention"], ["mamba"]]
    attention, hybrid, mamba = (text_memory(base(layer_types=each), ids) for each in types)
    assert attention < hybrid == mamba


def test_a_layer_that_does_not_fit_is_refused(tmp_path, text, tokenizer):
    sizes = VOCABULARY | {"intermediate_size": 2**16}
    path, _ = checkpoint(tmp_path / "in", base(**sizes))
    assert text_memory(base(**sizes), [torch.zeros(1, 32)]) > 12 * 2**20
    with pytest.raises(InputError, match=r"one layer and its outputs take .* MiB, --memory is 16"):
        grow(
            source=path,
            out=tmp_path / "out",
            to=model_file(tmp_path / "m.yaml", sizes),
            memory="16MiB",
            text=text,
            tokenizer=tokenizer,
        )
