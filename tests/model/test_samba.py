"""Mamba layers and Samba hybrids on one device: transformers' parts, to the last gradient."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagrow.config.schema import ModelConfig
from megagrow.model.decoder import CausalLM
from megagrow.model.decoding import DecodingCache
from megagrow.model.layers.base import DT_RANGE
from megagrow.model.masks import Masks
from megagrow.parallel.sharding import parameter_plan
from megagrow.reshard.fill import initial_rows
from tests.helpers.hugging_face import tokens
from tests.helpers.model.samba_reference import SambaReference, drawn, mixer_of, part_of, samba

EXACT = 1e-5
CONFIG = samba(num_key_value_heads=2)
DOCUMENTS = (5, 1, 10)
"""Lengths of the packed documents; the second is shorter than the convolution."""


def model_of(config: ModelConfig, recompute: str = "none") -> CausalLM:
    model = CausalLM(config, recompute)
    model.load_state_dict(drawn(config), strict=not config.tie_word_embeddings)
    return model


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def gradients(
    model: CausalLM, ids: Tensor, labels: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    logits = model(ids, positions(ids), documents)
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_a_mixer_is_that_of_transformers() -> None:
    """The output, and the gradients of the input and of all weights."""
    model, layer = model_of(CONFIG), "model.layers.2.mamba."
    block, theirs = model.get_submodule(layer[:-1]), mixer_of(CONFIG)
    found = dict(block.named_parameters())
    with torch.no_grad():
        for name, parameter in found.items():
            part_of(f"mamba.{name}", lambda n: theirs.get_parameter(n[6:])).copy_(parameter)
    x = torch.randn(2, 19, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    results = []
    for mixer in (theirs, lambda x: run_block(model, block, x)):
        leaf = x.clone().requires_grad_()
        y = mixer(leaf)
        (y * x.cos()).sum().backward()
        results.append((y.detach(), leaf.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EXACT)
    for name, parameter in found.items():
        expected = part_of(f"mamba.{name}", lambda n: theirs.get_parameter(n[6:]).grad)
        largest = expected.abs().max().item()
        close = {"rtol": EXACT, "atol": EXACT * max(largest, 1)}
        torch.testing.assert_close(parameter.grad, expected, **close, msg=name)
        assert largest > 100 * EXACT, f"{name}: the test would prove nothing"


def run_block(model: CausalLM, block: nn.Module, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1]).expand(len(x), -1)
    return block(x, model.model._context(places, None, Masks(), x.dtype, None))


@pytest.mark.parametrize("changes", [{}, {"mamba_d_state": 16, "mamba_d_conv": 2}], ids=str)
def test_logits_and_gradients_are_those_of_transformers(changes: dict[str, Any]) -> None:
    config = samba(num_key_value_heads=2, **changes)
    ids, labels = tokens(config, 3, 16)
    reference = SambaReference(config, drawn(config))
    expected = reference(ids)
    nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    logits, found = gradients(model_of(config), ids, labels)
    assert (logits - expected).abs().max() < EXACT
    wanted = reference.gradients()
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() < EXACT, name
        assert gradient.abs().max() > 10 * EXACT, f"{name}: the test would prove nothing"


def test_packed_documents_are_each_document_alone() -> None:
    """The convolution, the scan and attention restart; rotary positions restart with them."""
    model = model_of(CONFIG)
    ids, _ = tokens(CONFIG, 1, sum(DOCUMENTS))
    alone = torch.cat([model(part, positions(part)) for part in ids.split(DOCUMENTS, 1)], dim=1)
    restarted = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    documents = torch.repeat_interleave(torch.tensor(DOCUMENTS))[None]
    packed = model(ids, restarted, model.ops.pack(documents))
    assert (packed - alone).abs().max() < EXACT
    assert (model(ids, restarted) - packed)[:, DOCUMENTS[0] :].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("layer", range(2), ids=["mamba", "attention"])
def test_each_type_restarts_at_documents(layer: int) -> None:
    """Gradients of the input of a layer do not cross the start of a document."""
    model, documents = model_of(CONFIG), torch.repeat_interleave(torch.tensor(DOCUMENTS))[None]
    x = torch.randn(1, sum(DOCUMENTS), CONFIG.hidden_size, requires_grad=True)
    packed = model.ops.pack(documents)
    for context, crosses in ((packed, False), (None, True)):
        places = torch.arange(x.shape[1])[None]
        inputs = model.model._context(places, context, Masks(), x.dtype, None)
        out, delta = model.model.layers[str(layer)](x, inputs)
        (gradient,) = torch.autograd.grad((out + delta)[:, 7:].square().sum(), x)
        assert bool(gradient[:, :6].any()) == crosses


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(recompute: str, packed: bool) -> None:
    ids, labels = tokens(CONFIG, 2, 12)
    documents = torch.arange(12).div(5, rounding_mode="floor").expand(2, 12) if packed else None
    logits, expected = gradients(model_of(CONFIG), ids, labels, documents)
    found_logits, found = gradients(model_of(CONFIG, recompute), ids, labels, documents)
    assert torch.equal(found_logits, logits)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bf16_has_the_rounding_error_of_bf16(autocast: bool) -> None:
    ids, labels = tokens(CONFIG, 2, 16)
    expected, wanted = gradients(model_of(CONFIG), ids, labels)
    model = model_of(CONFIG) if autocast else model_of(CONFIG).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids, positions(ids)).float()
    nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert 0 < relative(logits, expected) < 0.03
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, wanted[name]) < 0.2, name


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, in relation to that of the expected values."""
    return ((found.float() - expected).norm() / expected.norm()).item()


@torch.no_grad()
def decoding_difference(model: CausalLM, masks: Masks | None = None) -> float:
    """Decode in passes of 1 to 5 tokens; return the largest difference from complete passes."""
    text, _ = tokens(model.config, 3, 24)
    cache, rows = DecodingCache(model.config, torch.device("cpu")), [0, 1, 2]
    read, worst = dict.fromkeys(rows, 0), 0.0
    for counts in ([3, 9, 1], [1, 1, 1], [2, 1, 5], [1, 4], [1, 1]):
        if len(counts) < len(rows):
            cache.keep([0, 2])
            rows = [0, 2]
        parts = [text[row, read[row] :][:n] for row, n in zip(rows, counts, strict=True)]
        ids = cache.begin([part.tolist() for part in parts])
        logits = model(ids, cache.sequences.positions(ids.shape[1]), None, masks, None, cache)
        cache.end()
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            read[row] += count
            seen = text[row : row + 1, : read[row]]
            expected = model(seen, positions(seen), None, masks)[0, -count:]
            worst = max(worst, (logits[index, :count] - expected).abs().max().item())
    return worst


def test_decoding_gives_the_logits_of_complete_passes() -> None:
    assert decoding_difference(model_of(CONFIG)) < EXACT


def test_growth_masks_apply_in_decoding() -> None:
    inner = torch.linspace(1, 0.1, CONFIG.mamba_d_inner)
    masks = Masks(layers=(1.0, 1.0, 0.5, 0.5), inner=inner)
    model = model_of(CONFIG)
    assert decoding_difference(model, masks) < EXACT
    ids, _ = tokens(CONFIG, 1, 9)
    assert (model(ids, positions(ids), None, masks) - model(ids, positions(ids))).abs().max() > 0.1


def test_a_masked_channel_is_no_channel() -> None:
    """With the factor 0, values of a channel's parameters do not matter."""
    model, inner = model_of(CONFIG), torch.ones(CONFIG.mamba_d_inner)
    inner[-5:] = 0
    ids, _ = tokens(CONFIG, 2, 12)
    before = model(ids, positions(ids), None, Masks(inner=inner))
    for name, parameter in model.named_parameters():
        if ".mamba." in name:
            rows = parameter if parameter.shape[0] == CONFIG.mamba_d_inner else parameter.T
            rows.data[-5:] += 3.0
    assert torch.equal(model(ids, positions(ids), None, Masks(inner=inner)), before)
    assert not torch.equal(model(ids, positions(ids)), before)


def test_values_of_channels_do_not_decay() -> None:
    """As in the original code, A and D do not; neither do vectors."""
    plan = parameter_plan(CONFIG, tp=1)
    kept = {spec.name_in_layer for spec in plan.values() if not spec.decays}
    channels = {"A_log", "D", "conv1d.bias", "dt_proj.bias"}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"}
    assert kept == {f"mamba.{name}" for name in channels} | norms


def test_initial_values_are_those_of_the_paper() -> None:
    config = samba(mamba_d_state=16, mamba_dt_rank=9, mamba_d_inner=600)
    plan = parameter_plan(config, tp=1)
    found = {
        name.split(".mamba.")[1]: initial_rows(spec, 5, range(spec.rows))
        for name, spec in plan.items()
        if spec.layer == 2 and ".mamba." in name
    }
    states = torch.arange(1.0, 17.0)
    torch.testing.assert_close(found["A_log"].exp(), states.expand(600, 16))
    assert (found["D"] == 1).all() and found["D"].shape == (600, 1)
    dt = nn.functional.softplus(found["dt_proj.bias"])
    low, high = DT_RANGE
    assert low * 0.999 <= dt.min() < 1.1 * low and high / 1.1 < dt.max() <= high * 1.001
    assert dt.log().mean().item() == pytest.approx(math.log(low * high) / 2, abs=0.2)
    for name, bound in (("dt_proj.weight", 1 / 3), ("conv1d.weight", 0.5), ("conv1d.bias", 0.5)):
        values = found[name]
        assert 0.95 * bound < values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    for name in ("in_proj.weight", "gate_proj.weight", "x_proj.weight"):
        assert found[name].std().item() == pytest.approx(config.initializer_range, rel=0.05)
    scaled = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
    assert found["out_proj.weight"].std().item() == pytest.approx(scaled, rel=0.05)
