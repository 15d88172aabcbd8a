"""With masks, too, a run gives the same losses however it is spread, and they follow its tokens."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.config.schema import RunConfig
from megagrow.train.stage import build_stage, masks_now
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run, parallel_of, train_stage
from tests.helpers.spawn import run_ranks

GROWN = MODEL | {
    "num_hidden_layers": 3,
    "hidden_size": 44,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 60,
}
RAMP, STEPS = 4, 5
CLOSE = 1e-5


def masked_run(
    folder: Path, precision: str = "fp32", ramp: int = RAMP, **parallel: Any
) -> RunConfig:
    growth = {"operator": ["random_depth", "random_width"], "ramp_tokens": ramp * STEP_TOKENS}
    tokens = max(ramp, STEPS) * STEP_TOKENS
    grown = {"model": GROWN, "tokens": tokens, "growth": growth, "parallel": parallel}
    return make_run(folder, [{"tokens": STEP_TOKENS}, grown], precision=precision)


LAYOUTS = {
    1: (parallel_of(0, 1, recompute="full"), parallel_of(3, 1, recompute="selective")),
    2: (
        *(parallel_of(zero, 1) for zero in range(4)),
        parallel_of(0, 2, recompute="selective"),
        parallel_of(1, 2, sequence_parallel=True),
        parallel_of(2, 2, recompute="full"),
        parallel_of(3, 2, sequence_parallel=True, recompute="full"),
        parallel_of(1, 1, recompute="full") | {"pipeline_model_parallel_size": 2},
    ),
}
"""By the number of ranks: every ZeRO stage with and without TP, every option somewhere."""


def train_all(runs: list[RunConfig]) -> list[list[float]]:
    return [train_stage(run, 1, STEPS, sequences=4) for run in runs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


@pytest.fixture(scope="module")
def reference(folder) -> list[float]:
    """One process, no ZeRO, no options."""
    return run_ranks(1, train_all, [masked_run(folder)])[0][0]


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_masks_give_the_same_losses_in_every_layout(folder, reference, world):
    layouts = LAYOUTS[world]
    runs = [masked_run(folder, **parallel) for parallel in layouts]
    for rank in run_ranks(world, train_all, runs):
        for parallel, losses in zip(layouts, rank, strict=True):
            assert losses == pytest.approx(reference, rel=CLOSE), parallel


@pytest.mark.dist
def test_other_ramps_give_other_losses(folder, reference):
    """Else the test above would prove nothing."""
    (found,) = run_ranks(1, train_all, [masked_run(folder, ramp=1), masked_run(folder, ramp=40)])
    assert len(reference) == 3 * STEPS
    for losses in found:
        assert losses[:3] == reference[:3], "the first step is that of mask 0"
        assert abs(losses[-3] / reference[-3] - 1) > 20 * CLOSE


@pytest.mark.dist
def test_bf16_follows_fp32(folder, reference):
    runs = [masked_run(folder, "bf16", **parallel_of(zero, 2)) for zero in (0, 1)]
    for found in run_ranks(2, train_all, runs)[0]:
        for kind in (0, 1):  # both losses; norms of gradients drift apart sooner
            assert found[kind::3] == pytest.approx(reference[kind::3], rel=5e-3)
            assert found[kind::3] != reference[kind::3]


def parts_of(run: RunConfig) -> dict[str, Any]:
    """Return the masks of this rank, late in the ramp."""
    stage = build_stage(run, 1, torch.device("cpu"))
    masks, gone = (masks_now(run, stage, steps * STEP_TOKENS) for steps in (4, 24))
    stage.release()
    assert masks is not None and gone is None
    return dataclasses.asdict(masks)


@pytest.mark.dist
def test_a_rank_has_the_masks_of_its_own_slices(folder):
    run = masked_run(folder, ramp=24, **parallel_of(0, 2))
    first, second = run_ranks(2, parts_of, run)
    assert first["layers"] == second["layers"] == (1.0, 1.0, pytest.approx(1 / 6))
    assert first["ffn"].tolist() == [1.0] * 30
    assert second["ffn"].tolist() == [1.0] * 18 + [0.5] * 12
    for rank in (first, second):
        assert rank["residual"].tolist() == [1.0] * 32 + [0.0] * 12
    assert first["groups"].tolist() == [1.0, 1.0]
    assert second["groups"].tolist() == [0.0, 0.0]
