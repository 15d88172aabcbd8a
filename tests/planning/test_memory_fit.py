"""Messages about insufficient memory name the stage, the largest part and the remedies."""

from pathlib import Path
from typing import Any

import pytest

from megagrow.config.load import load_run
from megagrow.planning.memory import StageMemory, stage_memory
from megagrow.planning.memory_fit import memory_warnings, on_gpu

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def memory(*overrides: str, world: int = 8) -> StageMemory:
    """Plan of the paper's 1.1B from scratch."""
    run = load_run(CONFIGS / "scratch-1.1b.yaml", overrides)
    return stage_memory(run.stages[0], world, bf16=True)


def said(found: StageMemory, capacity: int, growth: int | None = None) -> list[str]:
    return list(memory_warnings([found], [growth], capacity))


def test_what_fits_is_not_spoken_of() -> None:
    found = memory()
    assert said(found, found.training, growth=found.training) == []
    assert len(said(found, found.training - 1)) == 1


def test_activations_that_do_not_fit() -> None:
    found = memory()
    needed, kept = found.training / 2**30, found.activations() / 2**30
    assert said(found, 40 * 10**9) == [
        f"stages.0 does not fit: {needed:.1f} of 37.3 GiB per GPU; largest part: activations, "
        f"{kept:.1f} GiB; try activation_checkpointing: selective or full, "
        "a smaller micro_batch_size, kernels.linear_cross_entropy, zero_stage: 2 or higher, "
        "a larger tensor_model_parallel_size"
    ]


SAVING = (
    "parallel.activation_checkpointing=full",
    "batch.micro_batch_size=1",
    "kernels.linear_cross_entropy=true",
)


@pytest.mark.parametrize(
    ("more", "world", "part", "tried"),
    [
        (
            (), 8, "gradients",
            "zero_stage: 2 or higher, a larger tensor_model_parallel_size",
        ),
        (("parallel.zero_stage=3",), 1, "fp32 masters and moments", "more ranks"),
    ],
)  # fmt: skip
def test_only_what_helps_is_advised(more: Any, world: int, part: str, tried: str) -> None:
    (text,) = said(memory(*SAVING, *more, world=world), 10**9)
    assert f"largest part: {part}, " in text and text.endswith(f"; try {tried}")


def test_an_offloaded_state_is_not_on_the_gpu() -> None:
    found = memory("parallel.offload_optimizer=true")
    assert on_gpu(found) == found.training - found.state


def test_a_growth_that_does_not_fit() -> None:
    found = memory()
    (text,) = said(found, 80 * 10**9, growth=81 * 10**9)
    assert text.startswith("stages.0: the growth at its start does not fit: 75.4 of 74.5 GiB")


def test_hybrid_sharding_holds_a_second_copy_over_fewer_ranks() -> None:
    parameters = memory("parallel.zero_stage=0").gradients // 4
    plain = memory("parallel.zero_stage=3")
    hybrid = memory("parallel.zero_stage=3", "parallel.zero_hpz_partition_size=4")
    assert hybrid.weights - plain.weights == 2 * parameters // 4
