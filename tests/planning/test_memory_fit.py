"""Messages about insufficient memory name the stage, the largest part and the remedies."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import yaml

from megagrow.config.load import load_run, to_yaml
from megagrow.config.schema import RunConfig
from megagrow.errors import ConfigError
from megagrow.planning.memory import StageMemory, stage_memory
from megagrow.planning.memory_fit import (
    USABLE,
    fit_micro_batches,
    fit_to_devices,
    memory_warnings,
    on_gpu,
)
from tests.helpers.spawn import run_ranks

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
            "zero_stage: 2 or higher, a larger tensor_model_parallel_size, "
            "a larger pipeline_model_parallel_size",
        ),
        (("parallel.zero_stage=3",), 1, "fp32 masters and moments", "more ranks"),
        (
            ("parallel.zero_stage=3", "parallel.activation_checkpointing=none"), 32, "activations",
            "activation_checkpointing: selective or full, a larger tensor_model_parallel_size, "
            "a larger context_parallel_size",
        ),
    ],
)  # fmt: skip
def test_only_what_helps_is_advised(more: Any, world: int, part: str, tried: str) -> None:
    (text,) = said(memory(*SAVING, *more, world=world), 10**9)
    assert f"largest part: {part}, " in text and text.endswith(f"; try {tried}")


def test_an_offloaded_state_is_not_on_the_gpu() -> None:
    found = memory("parallel.offload_optimizer=true")
    assert on_gpu(found) == found.training - found.state


def test_a_transition_that_does_not_fit() -> None:
    found = memory()
    (text,) = said(found, 80 * 10**9, growth=81 * 10**9)
    assert text.startswith("stages.0: the transition at its start does not fit: 75.4 of 74.5 GiB")


def test_hybrid_sharding_holds_a_second_copy_over_fewer_ranks() -> None:
    parameters = memory("parallel.zero_stage=0").gradients // 4
    plain = memory("parallel.zero_stage=3")
    hybrid = memory("parallel.zero_stage=3", "parallel.zero_hpz_partition_size=4")
    assert hybrid.weights - plain.weights == 2 * parameters // 4


RAMP = "batch.rampup_batch_size=[96, 32, 10K]"


def automatic(*overrides: str) -> RunConfig:
    return load_run(CONFIGS / "scratch-1.1b.yaml", ["batch.micro_batch_size=auto", *overrides])


@pytest.mark.parametrize(
    ("overrides", "needed_by", "size"),
    [((), 8, 8), ((), 16, 16), ((), 1024, 1024 // 8), ((RAMP,), 1024, 32 // 8)],
)
def test_the_largest_micro_batch_that_fits(
    overrides: tuple[str, ...], needed_by: int, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    run = automatic("batch.global_batch_size=1024", *overrides)
    needed = on_gpu(memory("batch.global_batch_size=1024", f"batch.micro_batch_size={needed_by}"))
    capacity = int(needed / USABLE) + 1
    with caplog.at_level("INFO"):
        fitted = fit_micro_batches(run, 8, capacity, bf16=True)
    assert fitted.stages[0].batch.micro_batch_size == size
    assert f"stage 0 | micro_batch_size auto: {size} | " in caplog.text
    below = fit_micro_batches(run, 8, capacity - 2, bf16=True).stages[0].batch.micro_batch_size
    assert below == (size // 2 if size == needed_by else size)
    assert yaml.safe_load(to_yaml(fitted))["stages"][0]["batch"]["micro_batch_size"] == "auto"


def test_a_micro_batch_that_cannot_be_computed() -> None:
    with pytest.raises(ConfigError, match=r"micro_batch_size = auto needs the memory of a GPU"):
        fit_micro_batches(automatic(), 8, None, bf16=True)
    with pytest.raises(ConfigError, match=r"of 1 does not fit: [\d.]+ of 0\.9 GiB .*try act"):
        fit_micro_batches(automatic(), 8, 10**9, bf16=True)
    with pytest.raises(ConfigError, match=r"unknown key .*micro_batch_size_auto"):
        automatic("batch.micro_batch_size_auto=true")


def _chosen() -> int:
    """Choose on ranks of which the last has a tenth of the others' memory."""
    size = 16 * 10**11 // (1 if dist.get_rank() == 0 else 10)
    with patch("megagrow.planning.memory_fit._device_memory", return_value=size):
        run = fit_to_devices(automatic(), torch.device("cpu"))
    return run.stages[0].batch.micro_batch_size


@pytest.mark.dist
def test_ranks_use_the_smallest_memory() -> None:
    # Ranks of one host share its memory: 16e10 / 2 bytes each.
    fitted = fit_micro_batches(automatic(), 2, 8 * 10**10, bf16=False, on_cpu=True)
    assert run_ranks(2, _chosen) == [fitted.stages[0].batch.micro_batch_size] * 2
