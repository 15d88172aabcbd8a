"""DeepSpeed's own engine, loader and converter around a model that has only our parameters' names:
nothing of megagrow's is called, but for making the process group."""

import argparse
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
)
from torch import Tensor, nn

from megagrow.parallel.plan import ParamSpec

Whole = dict[str, dict[str, Tensor]]
"""Parameter -> kind of state -> whole tensor, as DeepSpeed gives it; and Adam's step."""


class Named(nn.Module):
    """A module whose parameters have dotted names; its loss reaches all of them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            parent: nn.Module = self
            *folders, leaf = name.split(".")
            for folder in folders:
                if not hasattr(parent, folder):
                    parent.add_module(folder, nn.Module())
                parent = getattr(parent, folder)
            setattr(parent, leaf, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, factor: Tensor) -> Tensor:
        # Quadratic, so that every element gets a gradient of its own.
        return sum(((p * (i + 1) - factor) ** 2).sum() for i, p in enumerate(self.parameters()))


def shapes_of(plan: dict[str, ParamSpec]) -> dict[str, tuple[int, ...]]:
    return {
        name: (spec.rows,) if spec.is_vector else (spec.rows, spec.cols)
        for name, spec in plan.items()
    }


def engine_of(shapes: dict[str, tuple[int, ...]], stage: int, *, universal: bool = False) -> Any:
    """An engine with torch's AdamW, fp32."""
    model = Named(shapes, seed=5)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"load_universal": universal},
            "steps_per_print": 2**31,
        },
        dist_init_required=False,
    )
    return engine


def train(engine: Any, steps: int) -> None:
    for step in range(steps):
        engine.backward(engine(torch.tensor(float(step))))
        engine.step()


def state_of(engine: Any) -> tuple[Whole, set[float]]:
    """All states, whole, and the values of Adam's step; all ranks together."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = {
            "fp32": safe_get_full_fp32_param(parameter),
            "exp_avg": safe_get_full_optimizer_state(parameter, "exp_avg"),
            "exp_avg_sq": safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
        }
    steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    return {
        n: {k: t.detach().clone() for k, t in kinds.items()} for n, kinds in found.items()
    }, steps


def train_and_save(folder: Path, shapes: dict, stage: int, steps: int) -> tuple[Whole, set[float]]:
    engine = engine_of(shapes, stage)
    train(engine, steps)
    engine.save_checkpoint(str(folder), tag="theirs")
    found = state_of(engine)
    engine.destroy()
    return found


def load(folder: Path, shapes: dict, stage: int) -> tuple[Whole, set[float], int]:
    """What an engine has that loads a Universal Checkpoint, and its count of steps."""
    engine = engine_of(shapes, stage, universal=True)
    path, _ = engine.load_checkpoint(str(folder))
    assert path is not None
    found = (*state_of(engine), engine.global_steps)
    train(engine, 1)  # and goes on
    engine.destroy()
    return found


def to_universal(source: Path, out: Path) -> None:
    """DeepSpeed's own converter."""
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
