from typing import Any

import pytest

from megagrow.common.gpu_specs import peak_flops
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.config.stage_length import run_flops
from megagrow.model.layers.flops import (
    flops_per_token,
    matmul_flops,
    non_embedding_parameters,
    paper_flops_per_token,
    parameters,
)
from tests.helpers.hugging_face import hugging_face


def llama(layers: int, hidden: int, heads: int, kv: int, ffn: int, **more: Any) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=ffn,
        vocab_size=more.pop("vocab_size", 32000),
        **more,
    )


PAPER = {
    "410M": (llama(24, 1024, 16, 16, 2816), 373.9e6, 308.3e6, 2.243e9),
    "1.1B": (llama(24, 2048, 32, 32, 5632), 1364.3e6, 1233.2e6, 8.186e9),
    "3B": (llama(32, 2560, 20, 4, 7040), 2397.5e6, 2233.6e6, 1.438e10),
    "7B": (llama(32, 4096, 32, 8, 11008), 5933.1e6, 5671.0e6, 3.560e10),
}


@pytest.mark.parametrize("name", PAPER)
def test_totals_are_the_papers(name: str) -> None:
    model, total, inner, flops = PAPER[name]
    assert parameters(model) == pytest.approx(total, abs=5e4)
    assert non_embedding_parameters(model) == pytest.approx(inner, abs=5e4)
    assert paper_flops_per_token(model) == pytest.approx(flops, rel=5e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_count_is_that_of_hugging_face(kv: int, tied: bool) -> None:
    model = llama(3, 32, 4, kv, 48, vocab_size=96, tie_word_embeddings=tied)
    assert parameters(model) == sum(one.numel() for one in hugging_face(model).parameters())


def test_true_flops_are_those_of_the_matrix_products() -> None:
    """Against a count product by product: forward 2 m n k each, backward twice that."""
    model, length = llama(3, 32, 4, 2, 48, vocab_size=96), 7
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    linear = 2 * length * (3 * sum(m * n for m, n in shapes) + 32 * 96)
    seen = sum(position + 1 for position in range(length))
    attention = 3 * 4 * seen * (2 * 8 + 2 * 8)
    assert flops_per_token(model, length) * length == 3 * (linear + attention)


def test_lookup_and_tying_cost_no_flops() -> None:
    tied, untied = (llama(2, 16, 2, 2, 32, tie_word_embeddings=tied) for tied in (True, False))
    assert flops_per_token(tied, 64) == flops_per_token(untied, 64)
    assert parameters(untied) - parameters(tied) == 32000 * 16
    assert non_embedding_parameters(untied) == non_embedding_parameters(tied)
    assert parameters(tied) - matmul_flops(tied) // 6 == 16 * (2 * 2 + 1)


def test_run_adds_up_its_stages() -> None:
    base, target = llama(1, 16, 2, 2, 32), llama(4, 16, 2, 2, 32)
    common = {
        "batch": {"global_batch_size": 2, "micro_batch_size": 1},
        "optimizer": {"lr": 1.0},
    }
    run = RunConfig.model_validate(
        {
            "name": "run",
            "output_dir": "out",
            "data": {"train": [{"path": "corpus"}], "sequence_length": 8},
            "stages": [
                {"model": base, "tokens": 17, **common},
                {"model": target, "tokens": 64, "growth": {}, **common},
            ],
        }
    )
    assert run_flops(run) == 32 * flops_per_token(base, 8) + 64 * flops_per_token(target, 8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_name(name: str, expected: float | None) -> None:
    assert peak_flops(name) == expected
