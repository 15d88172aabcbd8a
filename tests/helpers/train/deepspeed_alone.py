"""DeepSpeed's own engine, loader and converter around transformers' Llama, whose parameters have
our names: nothing of megagrow's is called, but for making the process group."""

import argparse
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from megagrow.config.schema import ModelConfig
from tests.helpers.hugging_face import hugging_face, tokens

Whole = dict[str, dict[str, Tensor]]
"""Parameter -> kind of state -> whole tensor, as DeepSpeed gives it."""


def engine_of(config: ModelConfig, stage: int, *, universal: bool = False) -> Any:
    """An engine with torch's AdamW, fp32."""
    model = hugging_face(config, seed=5)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "checkpoint": {"load_universal": universal},
            "steps_per_print": 2**31,
        },
        dist_init_required=False,
    )
    return engine


def train(engine: Any, config: ModelConfig, steps: int) -> None:
    for step in range(steps):
        ids, _ = tokens(config, 1, 16, seed=step)
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()


def state_of(engine: Any) -> tuple[Whole, set[float]]:
    """All states, whole, and the values of Adam's step; all ranks together."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        states = {"fp32": safe_get_full_fp32_param(parameter)}
        for kind in ("exp_avg", "exp_avg_sq"):
            states[kind] = safe_get_full_optimizer_state(parameter, kind)
        found[name] = {kind: values.detach().clone() for kind, values in states.items()}
    return found, {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}


def train_and_save(
    folder: Path, config: ModelConfig, stage: int, steps: int
) -> tuple[Whole, set[float]]:
    engine = engine_of(config, stage)
    train(engine, config, steps)
    engine.save_checkpoint(str(folder), tag="theirs")
    return state_of(engine)


def load(folder: Path, config: ModelConfig, stage: int) -> tuple[Whole, set[float], int]:
    """State of an engine that loads a Universal Checkpoint, and its count of steps."""
    engine = engine_of(config, stage, universal=True)
    path, _ = engine.load_checkpoint(str(folder))
    assert path is not None
    found = (*state_of(engine), engine.global_steps)
    train(engine, config, 1)  # and goes on
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
