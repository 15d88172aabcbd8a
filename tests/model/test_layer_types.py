"""Test that a layer type registered here only is sharded, grown and counted by its declaration."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import ModelConfig, StageConfig
from megagrow.growth.map import Gather
from megagrow.growth.operators import growth_map
from megagrow.model.decoder import CausalLM
from megagrow.model.layers import table
from megagrow.model.layers.base import (
    ONES,
    READS_RESIDUAL,
    WRITES_RESIDUAL,
    ActivationAxis,
    LayerType,
    ParameterDeclaration,
    ones,
    scaled_normal,
)
from megagrow.model.layers.costs import RowElements
from megagrow.model.layers.flops import flops_per_token, parameters
from megagrow.model.layers.modules import Context, LayerModule
from megagrow.parallel.sharding import parameter_plan
from megagrow.planning.memory import stage_memory
from tests.helpers.hugging_face import tiny

PACKAGE = Path(__file__).resolve().parents[2] / "megagrow"

INNER = ActivationAxis("inner", ("intermediate_size",), "intermediate_size")

PARAMETERS = (
    ParameterDeclaration("scale", INNER.produced, None, ones),
    ParameterDeclaration("in_proj.weight", INNER.produced, READS_RESIDUAL),
    ParameterDeclaration("out_proj.weight", WRITES_RESIDUAL, INNER.consumed, scaled_normal),
)


class Scaled(LayerModule):
    """out_proj(scale * tanh(in_proj(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.intermediate_size))
        self.in_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.out_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        return self.out_proj(self.scale * torch.tanh(self.in_proj(x_BSD)))


SCALED = LayerType(
    "scaled",
    label="scaled",
    parameters=lambda config: PARAMETERS,
    activation_bytes=lambda config, batch: (
        2 * config.intermediate_size * batch.tokens * batch.width
    ),
    build=Scaled,
    row_elements=lambda config: RowElements(2, 3),
    kernel_calls=lambda config, inputs: (),
    score_flops=lambda config, sequence_length: 1000,
)

SMALL = tiny(num_hidden_layers=2)
"""Hidden size 32, intermediate size 48."""


@pytest.fixture(autouse=True)
def scaled_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the type: every layer is attention, then the scaled block."""
    monkeypatch.setattr(table, "FEED_FORWARD", SCALED)


def test_sharding_and_model_have_the_declared_parameters() -> None:
    with torch.device("meta"):
        model = CausalLM(SMALL)
    plan = parameter_plan(SMALL, tp=2)
    shapes = {
        name: (spec.rows,) if spec.is_vector else (spec.rows, spec.cols)
        for name, spec in plan.items()
    }
    assert shapes == {name: tuple(each.shape) for name, each in model.named_parameters()}
    assert list(shapes) == [name for name, _ in model.named_parameters()]
    prefix, hidden, inner = "model.layers.1.scaled", SMALL.hidden_size, SMALL.intermediate_size
    assert plan[f"{prefix}.in_proj.weight"].slice_shape(2) == (inner // 2, hidden)
    assert plan[f"{prefix}.scale"].slice_shape(2) == (inner // 2, 1)
    assert plan[f"{prefix}.out_proj.weight"].slice_shape(2) == (hidden, inner // 2)
    assert plan[f"{prefix}.in_proj.weight"].norm == "model.layers.1.post_attention_layernorm.weight"
    assert plan[f"{prefix}.scale"].initial == ONES


def test_counts_follow() -> None:
    with torch.device("meta"):
        model = CausalLM(SMALL)
    assert parameters(SMALL) == sum(each.numel() for each in model.parameters())
    matrices = sum(each.numel() for each in model.parameters() if each.dim() == 2)
    products = matrices - SMALL.vocab_size * SMALL.hidden_size
    attention = 6 * 2 * SMALL.num_attention_heads * SMALL.head_dim * 17
    assert flops_per_token(SMALL, 16) == 6 * products + attention + 2 * 1000


def test_activation_bytes_follow() -> None:
    def activations(model: ModelConfig) -> int:
        stage = StageConfig.model_validate(
            {
                "model": model,
                "data": {"train": "corpus", "sequence_length": 16},
                "tokens": 1,
                "batch": {"global_batch_size": 2, "micro_batch_size": 2},
                "optimizer": {"lr": 1.0},
            }
        )
        return stage_memory(stage, 1, bf16=True).activations()

    wider = SMALL.model_copy(update={"intermediate_size": 2 * SMALL.intermediate_size})
    added = 2 * (2 * SMALL.intermediate_size * 2 * 16 * 2)
    assert activations(wider) - activations(SMALL) == added


@pytest.mark.parametrize("operator", ["direct_width", "net2net_width", "zero_width"])
def test_growth_preserves_the_function(operator: str) -> None:
    target = SMALL.model_copy(update={"intermediate_size": 3 * SMALL.intermediate_size // 2})
    generator = torch.Generator().manual_seed(0)
    source = {
        name: torch.randn(spec.rows, spec.cols, generator=generator, dtype=torch.float64) * 0.3
        for name, spec in parameter_plan(SMALL, tp=1).items()
    }
    growth = growth_map(SMALL, target, GrowthConfig(operator=operator), "1/1")
    grown = {name: _grown(growth.weights[name], source) for name in growth.weights}
    # New neurons of zero_width are random; nothing consumes them.
    tokens = torch.arange(12)[None]
    before, after = (_logits(*each, tokens) for each in ((SMALL, source), (target, grown)))
    assert torch.allclose(before, after, rtol=0, atol=1e-12)


def _grown(terms: tuple, source: dict[str, Tensor]) -> Tensor:
    (term,) = terms
    assert isinstance(term, Gather)
    values = source[term.source]
    for dim, axis in enumerate((term.rows, term.cols)):
        index = np.arange(values.shape[dim]) if axis.index is None else axis.index
        scale = np.ones(len(index)) if axis.scale is None else axis.scale
        scale = torch.from_numpy(np.where(index < 0, 0.0, scale))
        values = values.index_select(dim, torch.from_numpy(np.maximum(index, 0)))
        values = values * (scale[:, None] if dim == 0 else scale)
    return values


def _logits(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    with torch.device("meta"):
        model = CausalLM(config).double()
    shapes = {name: each.shape for name, each in model.named_parameters()}
    shaped = {name: value.view(shapes[name]) for name, value in weights.items()}
    return functional_call(model, shaped, (tokens, tokens))


def test_declarations_may_depend_on_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that only tied models have."""
    optional = replace(
        SCALED,
        parameters=lambda config: PARAMETERS if config.tie_word_embeddings else PARAMETERS[1:],
    )
    monkeypatch.setattr(table, "FEED_FORWARD", optional)
    tied = SMALL.model_copy(update={"tie_word_embeddings": True})
    assert "model.layers.0.scaled.scale" in parameter_plan(tied, tp=1)
    assert "model.layers.0.scaled.scale" not in parameter_plan(SMALL, tp=1)


PROJECTIONS = re.compile(r"""["'.](?:q|k|v|o|gate|up|down)_proj\b""")

FOREIGN_NAMES = {"formats/megatron_layout.py"}
"""Tables of other programs' names."""


def test_only_layer_types_name_their_parameters() -> None:
    named = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if PROJECTIONS.search(path.read_text(encoding="utf-8"))
    }
    layers = {name for name in named if name.startswith("model/layers/")}
    # The docstring of `ParamSpec.name_in_layer` has an example.
    assert named - layers <= FOREIGN_NAMES | {"parallel/sharding.py"}
