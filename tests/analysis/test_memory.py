"""What a rank holds, by hand, and activations as torch's autograd really keeps them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.analysis.memory import StageMemory, growth_peak, stage_memory
from megagrow.config.schema import StageConfig
from megagrow.model.llama import LlamaForCausalLM
from megagrow.model.ops import PLAIN
from megagrow.reshard.exchange import BUCKET_BYTES

MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
}
LENGTH = 32
LAYER = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64
PARAMETERS = 2 * 100 * 64 + 64 + 2 * LAYER
SLICE = 2 * 50 * 64 + 64 + 2 * (LAYER // 2 + 64)
"""Of two tensor-parallel ranks: norms are whole, everything else is split."""


def memory(
    zero: int,
    world: int = 4,
    bf16: bool = True,
    model: dict[str, Any] | None = None,
    **parallel: Any,
) -> StageMemory:
    stage = StageConfig.model_validate(
        {
            "model": MODEL | (model or {}),
            "tokens": 1,
            "parallel": {"zero_stage": zero, **parallel},
            "batch": {"global_batch_size": 8, "micro_batch_size": 2},
            "optimizer": {"lr": 1.0},
        }
    )
    return stage_memory(stage, world, LENGTH, bf16)


def parts(found: StageMemory) -> tuple[int, int, int, int]:
    return found.state, found.weights, found.gathered, found.gradients


@pytest.mark.parametrize(
    ("zero", "bf16", "state", "weights", "gathered", "gradients"),
    [
        (0, True, 12.0, 2.0, 0.0, 4.0),
        (0, False, 12.0, 0.0, 0.0, 4.0),
        (1, True, 3.0, 2.0, 0.0, 6.0),
        (1, False, 3.0, 4.0, 0.0, 5.0),
        (2, True, 3.0, 2.0, 0.0, 3.0),
        (2, False, 3.0, 4.0, 0.0, 5.0),
        (3, True, 3.0, 0.5, 2.0, 3.0),
        (3, False, 3.0, 0.0, 4.0, 5.0),
    ],
)
def test_bytes_of_each_parameter_on_four_ranks(
    zero: int, bf16: bool, state: float, weights: float, gathered: float, gradients: float
) -> None:
    """All sizes here are multiples of 4: ranks hold equally many."""
    found = memory(zero, bf16=bf16)
    expected = [PARAMETERS * each for each in (state, weights, gathered, gradients)]
    assert list(parts(found)) == expected


def test_masters_on_the_cpu_are_not_the_weights_that_compute() -> None:
    """An offloaded optimizer has fp32 weights of its own beside a quarter of them on each rank."""
    assert memory(3, bf16=False, offload_optimizer=True).weights == PARAMETERS


def test_tensor_parallel_ranks_hold_a_slice() -> None:
    found = memory(2, tensor_model_parallel_size=2)
    assert parts(found) == (6 * SLICE, 2 * SLICE, 0, 2 * SLICE + 2 * SLICE)


def test_the_rank_that_holds_most_counts() -> None:
    """Three ranks share 100 x 64 = 6400 elements as 2134, 2134 and 2132 under ZeRO-3."""
    found = memory(3, world=3)
    assert found.held(0) > found.held(2)
    assert found.state == 12 * found.held(0)
    assert sum(found.held(rank) for rank in range(3)) == PARAMETERS


TOKENS = 2 * LENGTH
PER_TOKEN = (4 + 2) * 2 * 16 + 4 * 96
"""Elements of heads and feed-forward that a layer keeps of each token."""


@pytest.mark.parametrize(
    ("parallel", "layer", "residual"),
    [
        ({}, 2 * (4 * 64 + PER_TOKEN) + 4 * 4, 2 * 64),
        ({"tensor_model_parallel_size": 2}, 2 * (4 * 64 + PER_TOKEN // 2) + 4 * 2, 2 * 64),
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            2 * (3 * 64 + PER_TOKEN // 2) + 4 * 2,
            2 * 32,
        ),
    ],
)
def test_activations_by_hand(parallel: dict[str, Any], layer: int, residual: int) -> None:
    found = memory(1, **parallel)
    ends = residual + 2 * 64
    assert found.activations == TOKENS * (2 * layer + ends)
    assert found.activations_checkpointed == TOKENS * (2 * residual + layer + ends)


def test_what_is_configured_is_what_counts() -> None:
    plain, full, selective = (
        memory(1, activation_checkpointing=how) for how in ("none", "full", "selective")
    )
    assert plain.activations_used == selective.activations_used == plain.activations
    assert full.activations_used == full.activations_checkpointed < full.activations
    for found in (plain, full):
        kept = sum(parts(found)) + found.activations_used + found.logits
        assert found.training == kept


@pytest.mark.parametrize(("tp", "rows"), [(1, 101), (2, 51)])
@pytest.mark.parametrize(("bf16", "each"), [(True, 14), (False, 12)])
def test_logits_are_those_of_the_padded_slice(tp: int, rows: int, bf16: bool, each: int) -> None:
    model = {"vocab_size": 101}
    found = memory(1, bf16=bf16, model=model, tensor_model_parallel_size=tp)
    assert found.logits == TOKENS * rows * each


class FusedNorm(torch.autograd.Function):
    """Keeps what the fused norm of a GPU keeps: its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


def kept_by_autograd(model: LlamaForCausalLM) -> int:
    """Bytes that the backward pass of a micro batch needs, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(2, LENGTH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(ids, torch.arange(LENGTH).expand(2, LENGTH))
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps(bf16: bool) -> None:
    found = memory(1, world=1, bf16=bf16, model={"num_key_value_heads": 4})
    model = LlamaForCausalLM(found.stage.model, ops=replace(PLAIN, rms_norm=FusedNorm.apply))
    model.to(torch.bfloat16 if bf16 else torch.float32)
    # Beside what is counted: token ids, and one table of cosines and one of sines.
    beside = 8 * TOKENS + 2 * TOKENS * 16 * (2 if bf16 else 4)
    assert kept_by_autograd(model) == pytest.approx(found.activations + beside, rel=1e-3)


@pytest.mark.parametrize(
    ("zero", "bf16", "each"),
    [
        (0, True, 12.0),
        (1, True, 9.0),
        (1, False, 7.0),
        (2, True, 5.0),
        (3, True, 4.5),
        (3, False, 4.0),
    ],
)
def test_a_growth_holds_source_state_target_share_and_a_bucket(
    zero: int, bf16: bool, each: float
) -> None:
    source = memory(2, model={"num_hidden_layers": 1})
    target = memory(zero, bf16=bf16)
    before = 3 * (PARAMETERS - LAYER)
    assert growth_peak(source, target) == before + each * PARAMETERS + BUCKET_BYTES


def test_a_growth_peaks_on_the_rank_that_holds_most() -> None:
    source = memory(3, world=3, model={"num_hidden_layers": 1})
    target = memory(3, world=3)
    by_rank = [12 * source.held(rank) + (12 + 2 + 4) * target.held(rank) for rank in range(3)]
    assert by_rank[0] > by_rank[2]
    assert growth_peak(source, target) == by_rank[0] + BUCKET_BYTES
