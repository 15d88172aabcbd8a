"""A stage that never has all logits in memory trains and is measured as one that has them."""

from pathlib import Path

import pytest

from megagrow.config.schema import RunConfig
from tests.helpers.runs import make_run, parallel_of, train_stage
from tests.helpers.spawn import run_ranks

STEPS, LENGTH = 2, 16
KERNELS = (
    {"loss": "torch"},
    {"loss": "torch", "linear_cross_entropy": True},
    {"loss": "triton", "linear_cross_entropy": True},
)


def run_by(folder: Path, kernels: dict) -> RunConfig:
    """ZeRO-3 and TP 2: head and embedding are gathered for their modules only, and sliced."""
    stage = {
        "tokens": STEPS * 2 * LENGTH,
        "batch": {"global_batch_size": 2, "micro_batch_size": 1},
        "parallel": parallel_of(3, 2),
        "kernels": kernels,
        "optimizer": {"lr": 1e-2, "z_loss_multiplier": 1e-2},
    }
    return make_run(folder, [stage])


def train_all(runs: list[RunConfig]) -> list[list[float]]:
    return [train_stage(run, 0, STEPS, sequences=3) for run in runs]


@pytest.mark.dist
def test_linear_cross_entropy_changes_no_number(tmp_path):
    runs = [run_by(tmp_path, kernels) for kernels in KERNELS]
    for plain, *others in run_ranks(4, train_all, runs):
        for found in others:
            assert found == pytest.approx(plain, rel=1e-5)
            assert found != plain, "the same bits: was anything else computed?"
