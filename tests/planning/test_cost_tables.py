"""FLOPs by part, by hand, for a model of 2 layers with grouped keys."""

import pytest

from megagrow.config.schema import ModelConfig
from megagrow.planning.cost_tables import flops_parts

MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
}
PROJECTIONS = 6 * 2 * (64 * 64 + 64 * 32 + 64 * 32 + 64 * 64)
MLP = 6 * 2 * 3 * 64 * 96
TABLE = 6 * 100 * 64
CORE = 2 * 3 * 2 * (2 * 4 * 16) * 33 // 2
"""2 layers, forward and twice that backward, a multiplication and an addition for each of two
products over 4 heads of 16, with (32 + 1) / 2 positions on average."""
NORMS = 6 * 5 * 64


@pytest.mark.parametrize("tied", [False, True])
def test_flops_by_part(tied: bool) -> None:
    model = ModelConfig.model_validate(MODEL | {"tie_word_embeddings": tied})
    parts = dict(flops_parts(model, 32))
    embedding = 0 if tied else TABLE
    every = (
        PROJECTIONS + MLP + TABLE + CORE,
        PROJECTIONS + MLP + TABLE + embedding + NORMS,
    )
    assert parts == {
        "attention's projections": (PROJECTIONS, PROJECTIONS),
        "attention itself": (CORE, 0),
        "feed-forward": (MLP, MLP),
        "head": (TABLE, TABLE),
        "embedding": (0, embedding),
        "norms": (0, NORMS),
        "all": every,
    }
    assert all(sum(pair[i] for pair in list(parts.values())[:-1]) == every[i] for i in (0, 1))
