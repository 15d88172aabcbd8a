"""Memory of a rank, by hand."""

from typing import Any

import pytest
import torch

from megagrow.config.schema import ParallelConfig, StageConfig
from megagrow.parallel.replicated import COMMUNICATION_DTYPES
from megagrow.planning.memory import StageMemory, stage_memory
from megagrow.planning.memory_fit import growth_peak
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
LARGEST = 2 * 96 * 64
"""Gradients of gate and up, which autograd returns together; the embedding has 100 x 64."""
SLICE = 2 * 50 * 64 + 64 + 2 * (LAYER // 2 + 64)
"""Fractions for two tensor-parallel ranks: norms are replicated, everything else is split."""


def memory(
    zero: int,
    world: int = 4,
    bf16: bool = True,
    model: dict[str, Any] | None = None,
    sequences: int = 8,
    kernels: dict[str, Any] | None = None,
    on_cpu: bool = False,
    deepspeed: dict[str, Any] | None = None,
    **parallel: Any,
) -> StageMemory:
    stage = StageConfig.model_validate(
        {
            "model": MODEL | (model or {}),
            "data": {"train": "corpus", "sequence_length": LENGTH},
            "tokens": 1,
            "parallel": {"zero_stage": zero, **parallel},
            "batch": {"global_batch_size": sequences, "micro_batch_size": 2},
            "optimizer": {"lr": 1.0},
            "kernels": kernels or {},
            "deepspeed": deepspeed,
        }
    )
    return stage_memory(stage, world, bf16, on_cpu)


def parts(found: StageMemory) -> tuple[int, int, int, int, int]:
    return found.state, found.weights, found.gathered, found.gradients, found.buckets


@pytest.mark.parametrize(
    ("zero", "bf16", "state", "weights", "gathered", "gradients", "buckets"),
    [
        (0, True, 12.0, 2.0, 0.0, 4.0, 0.0),
        (0, False, 12.0, 0.0, 0.0, 4.0, 0.0),
        (1, True, 3.0, 2.0, 0.0, 4.0, 0.0),
        (1, False, 3.0, 4.0, 0.0, 4.0, 0.0),
        (2, True, 3.0, 2.0, 0.0, 1.0, 1.0),
        (2, False, 3.0, 4.0, 0.0, 1.0, 1.0),
        (3, True, 3.0, 0.5, 2.0, 1.0, 8.0),
        (3, False, 3.0, 0.0, 4.0, 1.0, 8.0),
    ],
)
def test_bytes_of_each_parameter_on_four_ranks(
    zero: int,
    bf16: bool,
    state: float,
    weights: float,
    gathered: float,
    gradients: float,
    buckets: float,
) -> None:
    """Sizes are multiples of 4: ranks hold equally many. ZeRO 1 and 2 hold two gradients more."""
    found = memory(zero, bf16=bf16)
    expected = [PARAMETERS * each for each in (state, weights, gathered, gradients, buckets)]
    expected[4] += (2 if bf16 else 4) * LARGEST * (zero in (1, 2))
    assert list(parts(found)) == expected


@pytest.mark.parametrize(("name", "dtype"), COMMUNICATION_DTYPES.items())
def test_bytes_of_communication_are_those_of_its_dtype(name: str, dtype: torch.dtype) -> None:
    parallel = ParallelConfig.model_validate({"communication_data_type": name})
    assert parallel.communication_bytes == dtype.itemsize


def test_sums_in_bf16_are_half_as_large_but_copies() -> None:
    staged = PARAMETERS // 2 + 2 * LARGEST  # two buckets of an eighth
    for zero, expected in enumerate((2 * PARAMETERS, staged, staged, 4 * PARAMETERS)):
        assert memory(zero, communication_data_type="bf16").buckets == expected


def test_gathered_weights_are_limited_by_deepspeeds_option() -> None:
    limited = {"zero_optimization": {"stage3_max_live_parameters": 60}}
    assert memory(3, deepspeed=limited).gathered == 60 * 2


def test_gradients_of_one_input_exist_together_without_a_norm_before_it() -> None:
    """Gate and up in bf16, as with a norm before the block."""
    models = ({}, {"model_type": "olmo2"})
    assert [memory(1, model=each).buckets for each in models] == [2 * LARGEST] * 2


def test_the_largest_layer_stands_for_the_first() -> None:
    """The order of layer types does not matter; `full` keeps nothing else of the layers."""
    types = ["mamba", "full_attention"]
    models = [{"layer_types": each} for each in (types, types[::-1], types[:1], types[1:])]
    setting = {"activation_checkpointing": "full"}
    *mixed, mamba, attention = (
        (m.at_end - m.state - m.weights - m.gradients - m.buckets)
        for m in (memory(1, model=each, **setting) for each in models)
    )
    assert mixed == [mamba, mamba] and attention < mamba


@pytest.mark.parametrize(
    ("zero", "bf16", "once", "accumulated"),
    [
        (0, True, 0.0, 4.0),
        (1, True, 4.0, 4.0),
        (1, False, 4.0, 4.0),
        (2, True, 2.0, 2.0),
        (3, True, 5.0, 5.0),
        (3, False, 5.0, 5.0),
    ],
)
def test_gradients_that_a_forward_pass_finds(
    zero: int, bf16: bool, once: float, accumulated: float
) -> None:
    """Four ranks take one micro batch of 2 each, or two."""
    held = [memory(zero, bf16=bf16, sequences=n).gradients_kept for n in (8, 16)]
    assert held == [PARAMETERS * once, PARAMETERS * accumulated]


def test_gloo_scatters_by_way_of_a_copy() -> None:
    assert memory(3, bf16=False, on_cpu=True).buckets == 12 * PARAMETERS


def test_nobody_gathers_from_itself() -> None:
    assert memory(3, world=1).gathered == 0


def test_masters_on_the_cpu_are_not_the_weights_that_compute() -> None:
    """An offloaded optimizer has fp32 weights of its own beside a quarter of them on each rank."""
    assert memory(3, bf16=False, offload_optimizer=True).weights == PARAMETERS


def test_tensor_parallel_ranks_hold_a_slice() -> None:
    found = memory(2, tensor_model_parallel_size=2)
    assert parts(found) == (6 * SLICE, 2 * SLICE, 0, 2 * SLICE, SLICE + 2 * LARGEST // 2)


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
    assert found.activations("none") == TOKENS * (2 * layer + ends)
    outputs = 2 * 2 * (2 * 64) + 2 * 2 * (2 * 96) // parallel.get("tensor_model_parallel_size", 1)
    assert found.activations("selective") == found.activations("none") - TOKENS * outputs
    assert found.activations("full") == TOKENS * (2 * residual + ends)


def test_what_is_configured_is_what_counts() -> None:
    for setting in ("none", "selective", "full"):
        found = memory(1, activation_checkpointing=setting)
        assert found.activations() == found.activations(setting)


def test_a_step_is_highest_at_the_loss_or_at_the_end() -> None:
    """ZeRO 1 in bf16: bytes per parameter 3 of state, 2 of weights, 4 of gradients; at the end one
    gradient of autograd, and one layer."""
    layer = TOKENS * (2 * (4 * 64 + PER_TOKEN) + 4 * 4)
    found = memory(1)
    assert found.at_loss == 9 * PARAMETERS + found.activations() + found.logits
    assert found.at_end == 9 * PARAMETERS + 2 * LARGEST + layer
    assert found.training == max(found.at_loss, found.at_end)
    full = memory(1, activation_checkpointing="full")
    assert full.at_loss == 9 * PARAMETERS + full.activations() + full.logits
    assert full.at_end == 9 * PARAMETERS + 2 * LARGEST + layer + TOKENS * 2 * 64
    # One rank under ZeRO 1: of 4 bytes each state (3), weights and gradients.
    alone = memory(1, world=1, bf16=False)
    layer = TOKENS * (4 * (4 * 64 + PER_TOKEN) + 4 * 4)
    assert alone.at_end == 20 * PARAMETERS + 4 * LARGEST + layer
    # ZeRO 2: state (3), weights (2), a quarter of the gradients, and two staging buckets.
    layer = TOKENS * (2 * (4 * 64 + PER_TOKEN) + 4 * 4)
    assert memory(2).at_end == 7 * PARAMETERS + 2 * LARGEST + layer


@pytest.mark.parametrize(("tp", "rows"), [(1, 101), (2, 51)])
@pytest.mark.parametrize("bf16", [False, True])
def test_logits_are_those_of_the_padded_slice(tp: int, rows: int, bf16: bool) -> None:
    """bf16: logits and two tensors in fp32. fp32: logits and one, or two if there is padding."""
    found = memory(1, bf16=bf16, model={"vocab_size": 101}, tensor_model_parallel_size=tp)
    each = 10 if bf16 else {1: 8, 2: 12}[tp]
    assert found.logits == TOKENS * rows * each


@pytest.mark.parametrize(("tp", "bf16", "each"), [(1, False, 8), (1, True, 8), (2, True, 10)])
def test_logits_on_a_cpu_are_widened_by_rows(tp: int, bf16: bool, each: int) -> None:
    model = {"vocab_size": 101}
    found = memory(1, bf16=bf16, on_cpu=True, model=model, tensor_model_parallel_size=tp)
    assert found.logits == TOKENS * (51 if tp == 2 else 101) * each


def test_logits_in_place_of_which_there_is_a_gradient() -> None:
    found = memory(1, kernels={"loss": "triton"})
    assert found.logits == TOKENS * 100 * 2


@pytest.mark.parametrize(
    ("zero", "loss", "chunk", "each", "weight"),
    [(1, "torch", 1, 10, 2), (1, "triton", 6, 2, 2), (0, "torch", 1, 10, 4)],
)
def test_logits_in_chunks(zero: int, loss: str, chunk: int, each: int, weight: int) -> None:
    """64 tokens in 64 chunks by torch, 10 by Triton; the gradients of 64 hidden states and of 100
    rows are made with them."""
    kernels = {"linear_cross_entropy": True, "loss": loss}
    found = memory(zero, kernels=kernels)
    assert found.logits == chunk * 100 * each + 64 * 64 * 2 + 100 * 64 * weight


@pytest.mark.parametrize(
    ("zero", "bf16", "each"),
    [
        (0, True, 12.0),
        (1, True, 5.0),
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
