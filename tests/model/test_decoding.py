"""Incremental decoding with a cache gives the logits of forward passes over complete sequences."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagrow.config.schema import ModelConfig
from megagrow.model.decoder import CausalLM
from megagrow.model.decoding import DecodingCache
from megagrow.model.layers import table
from megagrow.model.layers.base import (
    READS_RESIDUAL,
    WRITES_RESIDUAL,
    LayerType,
    ParameterDeclaration,
)
from megagrow.model.layers.costs import RowElements
from megagrow.model.layers.decoding import DecodedSequences, DecodingState
from megagrow.model.layers.modules import Context, LayerModule
from megagrow.model.masks import Masks
from tests.helpers.families import FAMILIES
from tests.helpers.hugging_face import LLAMA3, YARN, hugging_face, tiny, tokens

EXACT = 1e-5
LENGTHS = (3, 9, 1, 6)
"""Unequal prompts; the longest and the shortest one are dropped on the way."""

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "no layers": {"num_hidden_layers": 0},
    "gqa, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mqa, llama3": {"num_key_value_heads": 1, "rope_scaling": LLAMA3},
    "yarn": {"num_key_value_heads": 2, "rope_scaling": YARN},
    "dynamic, to the end of the window": {
        "num_key_value_heads": 2,
        "rope_scaling": DYNAMIC,
        "max_position_embeddings": 17,
    },
}
CASES |= {name: {"num_key_value_heads": 2} | keys for name, keys in FAMILIES.items()}
MASKS = Masks(
    layers=(1.0, 0.3),
    residual=torch.linspace(1, 0.1, 32),
    groups=torch.tensor([1.0, 0.4]),
    ffn=torch.linspace(1, 0.2, 48),
)


class Previous(DecodingState):
    """Last input of each sequence (B, 1, D)."""

    def __init__(self, sequences: DecodedSequences) -> None:
        self.sequences = sequences
        self.last: Tensor | None = None

    def keep(self, rows: Tensor) -> None:
        assert self.last is not None
        self.last = self.last[rows]


class Shift(LayerModule):
    """proj(the input at the previous position)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        before, state = torch.zeros_like(x_BSD[:, :1]), context.state
        if isinstance(state, Previous):
            before = before if state.last is None else state.last
            ends = torch.tensor(state.sequences.counts) - 1
            state.last = x_BSD[torch.arange(len(x_BSD)), ends][:, None]
        return self.proj(torch.cat([before, x_BSD[:, :-1]], dim=1))


def model_of(config: ModelConfig) -> CausalLM:
    model = CausalLM(config)
    model.load_state_dict(hugging_face(config).state_dict())
    return model.eval()


def last_logits(model: CausalLM, text: list[int], masks: Masks | None) -> Tensor:
    """Return the next token's logits from a forward pass over the complete text."""
    ids = torch.tensor([text])
    return model(ids, torch.arange(len(text))[None], None, masks)[0, -1].float()


@torch.no_grad()
def largest_difference(model: CausalLM, steps: int, masks: Masks | None = None) -> float:
    """Decode greedily; return the largest difference of the next tokens' logits."""
    random, _ = tokens(model.config, len(LENGTHS), max(LENGTHS))
    texts = [row[:length].tolist() for row, length in zip(random, LENGTHS, strict=True)]
    cache = DecodingCache(model.config, torch.device("cpu"))
    unread, worst = [list(text) for text in texts], 0.0
    for step in range(steps):
        ids = cache.begin(unread)
        positions = cache.sequences.positions(ids.shape[1])
        logits = model(ids, positions, None, masks, None, cache)
        cache.end()
        expected = [last_logits(model, text, masks) for text in texts]
        for row, wanted in enumerate(expected):
            found = logits[row, len(unread[row]) - 1]
            worst = max(worst, (found - wanted).abs().max().item())
        unread = [[int(each.argmax())] for each in expected]
        if step == 2:  # several tokens at once, as many as each text likes
            unread = [new + [row] * row for row, new in enumerate(unread)]
        texts = [text + new for text, new in zip(texts, unread, strict=True)]
        if step in (3, 5):
            rows = [0, 2, 3] if step == 3 else [0, 2]
            cache.keep(rows)
            texts, unread = [texts[row] for row in rows], [unread[row] for row in rows]
    assert max(map(len, texts)) > 12
    return worst


@pytest.mark.parametrize("case", CASES)
def test_cached_logits_are_those_of_complete_passes(case: str) -> None:
    model = model_of(tiny(**CASES[case]))
    assert largest_difference(model, steps=8) < EXACT


def test_growth_masks_apply_to_cached_keys_and_values() -> None:
    model = model_of(tiny(num_key_value_heads=2))
    assert largest_difference(model, steps=8, masks=MASKS) < EXACT
    text = tokens(model.config, 1, 9)[0][0].tolist()
    masked, plain = (last_logits(model, text, masks) for masks in (MASKS, None))
    assert (masked - plain).abs().max() > 0.1, "the masks changed nothing"


def test_a_layer_type_declares_its_own_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention with keys and values, and a type with a state of constant size."""
    declared = ParameterDeclaration("proj.weight", WRITES_RESIDUAL, READS_RESIDUAL)
    shift = LayerType(
        "shift",
        label="shift",
        parameters=lambda config: (declared,),
        activation_bytes=lambda config, batch: 0,
        build=Shift,
        row_elements=lambda config: RowElements(0, 0),
        kernel_calls=lambda config, inputs: (),
        decoding_state=Previous,
    )
    monkeypatch.setattr(table, "FEED_FORWARD", shift)
    torch.manual_seed(0)
    model = CausalLM(tiny(num_key_value_heads=2)).eval()
    assert list(DecodingCache(model.config, torch.device("cpu")).states(0)) == [
        "self_attn",
        "shift",
    ]
    assert largest_difference(model, steps=8) < EXACT


def test_bf16_has_the_rounding_error_of_bf16() -> None:
    model = model_of(tiny(num_key_value_heads=2)).bfloat16()
    assert largest_difference(model, steps=8) < 0.1


def test_buffers_grow_with_the_text() -> None:
    """140 tokens exceed the buffer twice."""
    config = tiny(num_key_value_heads=2, num_hidden_layers=1, max_position_embeddings=160)
    assert largest_difference(model_of(config), steps=140) < EXACT


def test_padding_of_sequence_parallelism_is_not_stored() -> None:
    """Columns after the new tokens repeat the last position and stay within the window."""
    config = tiny(num_key_value_heads=2, rope_scaling=DYNAMIC, max_position_embeddings=11)
    model, text = model_of(config), tokens(tiny(), 1, 11)[0][0].tolist()
    cache = DecodingCache(config, torch.device("cpu"))
    with torch.no_grad():
        for new in (text[:9], text[9:10], text[10:]):
            ids = torch.nn.functional.pad(cache.begin([new]), (0, 3))
            positions = cache.sequences.positions(ids.shape[1])
            assert positions.max() <= 10
            logits = model(ids, positions, None, None, None, cache)[0, len(new) - 1]
            cache.end()
        assert (logits - last_logits(model, text, None)).abs().max() < EXACT
