"""Conversions stay within the memory budget and preserve all bits."""

import pytest
import torch
from safetensors.torch import load_file

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.flops import parameters
from tools.benchmarks.checkpoint.convert_memory import measure, random_model, write_model

BUDGET = 16 * 2**20
PROGRAM = 300 * 2**20
"""Memory that a process may use besides the budget: Python, torch, and the rest of the imports."""
MODEL = ModelConfig(
    num_hidden_layers=3,
    hidden_size=384,
    num_attention_heads=8,
    intermediate_size=1536,
    vocab_size=12_003,
)


@pytest.mark.slow
def test_all_conversions_stay_in_the_budget(tmp_path):
    write_model(MODEL, tmp_path / "model", 16 * 10**6)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) > 3 * BUDGET and len(files) > 3
    costs = list(measure(tmp_path, str(BUDGET)))
    assert [cost.command for cost in costs] == [
        *("hf-import", "reshard", "megatron-export", "megatron-import"),
        *("universal-export", "universal-import", "hf-export"),
    ]
    for cost in costs:
        assert 100 * 2**20 < cost.peak_bytes < BUDGET + PROGRAM, cost
    (exported,) = (tmp_path / "out").glob("*.safetensors")
    written = load_file(exported)
    for path in files:
        for name, tensor in load_file(path).items():
            assert torch.equal(written.pop(name), tensor), name
    assert not written


def test_the_model_has_the_requested_size():
    assert 4 * parameters(random_model(3)) == pytest.approx(3e9, rel=0.05)
