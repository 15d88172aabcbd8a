"""Run files and input texts of the regression cases, with the keys of the first version."""

import argparse
import collections
import json
import string
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

Section = dict[str, Any]

VOCABULARY, SEQUENCE_LENGTH, BATCH = 512, 32, 8
STAGE_STEPS, CHECKPOINT_STEPS = 4, 2
STAGE_TOKENS = STAGE_STEPS * BATCH * SEQUENCE_LENGTH

MODEL: Section = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY + 3,
    "max_position_embeddings": 64,
}
"""Grouped-query attention; feed-forward width and vocabulary are not powers of two."""

WIDE: Section = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
}
"""Twice the width, with the same heads."""

DEEP: Section = {"num_hidden_layers": 4}

GROWN: dict[str, tuple[Section, Section]] = {
    "direct_depth": (DEEP, {}),
    "direct_depth interpolate": (DEEP, {"layers": "interpolate", "optimizer_state": "keep_v"}),
    "zero_depth": (DEEP, {}),
    "solar": (DEEP, {}),
    "llama_pro": (DEEP, {}),
    "mslt": (DEEP, {}),
    "midas": (DEEP, {}),
    "lidas": ({"num_hidden_layers": 3}, {}),
    "direct_width": (WIDE, {}),
    "direct_width uneven": (WIDE, {"split": "uneven", "noise": 1.0, "order": "tiled"}),
    "net2net_width": (WIDE, {}),
    "staged_width": (WIDE, {}),
    "bert2bert_fpi": (WIDE, {}),
    "bert2bert_aki": (WIDE, {"optimizer_state": "asymmetric"}),
    "hypercloning": (WIDE, {}),
    "mup_copy": (WIDE, {}),
    "lemon": (WIDE, {}),
    "sparkling": (WIDE, {"lr_schedule": "continue"}),
    "zero_width": (WIDE | {"rms_norm_eps": 5e-6}, {}),
    "zero_width literal": (WIDE, {"literal": True}),
    "head_dim": ({"head_dim": 16}, {}),
    "vocabulary": ({"vocab_size": VOCABULARY + 10}, {"mixing_noise": 0.1}),
    "isometric": ({"hidden_size": 48, "rms_norm_eps": 1e-5 * 32 / 48}, {}),
}
"""Growths from file to file: operator and variant -> changes of the model, options."""


def parallel(zero: int, tp: int) -> Section:
    """Return a `parallel` section; other options vary with the layout."""
    return {
        "zero_stage": zero,
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1 and zero != 1,
        "activation_checkpointing": ("none", "selective", "full", "none")[zero],
    }


def stage(model: Section, growth: Section | None = None, **keys: Any) -> Section:
    """Return a stage of a run."""
    grown = {} if growth is None else {"growth": growth}
    return {"model": MODEL | model, "tokens": STAGE_TOKENS, **grown, **keys}


def run_file(corpus: Path, stages: list[Section], zero: int, tp: int, **keys: Any) -> Section:
    """Return a run file; `output_dir` is relative to the folder of the case."""
    return {
        "name": "regression",
        "output_dir": "run",
        "data": {
            "train": [{"path": str(corpus / "train")}],
            "validation": [{"path": str(corpus / "validation")}],
            "tokenizer": str(corpus / "tokenizer.model"),
            "sequence_length": SEQUENCE_LENGTH,
        },
        "batch": {"global_batch_size": BATCH, "micro_batch_size": 2},
        "parallel": parallel(zero, tp),
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "weight_decay_on": "matrices"},
        "schedule": {"type": "cosine", "warmup_steps": 2},
        "checkpoint": {"interval": CHECKPOINT_STEPS, "keep_last": 100},
        "validation": {"interval": 3, "tokens": 1024},
        "logging": {"tensorboard": False},
        "stages": stages,
        **keys,
    }


def staged() -> list[Section]:
    """Return three stages: deeper by Gstack, then deeper and wider in one event."""
    both = {"operator": ["direct_depth", "direct_width"], "optimizer_state": "transport"}
    return [
        stage({}),
        stage(DEEP, {"operator": "direct_depth", "optimizer_state": "asymmetric"}),
        stage(WIDE | {"num_hidden_layers": 8}, both),
    ]


def growths() -> dict[str, tuple[int, int, list[Section]]]:
    """Return runs with special growths: name -> (ZeRO stage, TP, stages)."""
    few = {"steps": 3, "warmup_steps": 1}
    measured = {"optimizer_state": "probe_v", "probe_batches": 2}
    entries = {"peak": 1.3, "warmup_steps": 2}
    ramp = {"ramp_tokens": STAGE_TOKENS // 2}
    uneven = {"operator": "direct_width", "split": "uneven", "order": "tiled", "noise": 1.0}
    kept = {"operator": "direct_depth", "layers": "interpolate", "optimizer_state": "keep_v"}
    sparkling = {"operator": "sparkling", "lr_schedule": "continue", "new_entries": entries}
    frozen = {"operator": "zero_depth", "block": "random", "freeze_tokens": STAGE_TOKENS // 2}
    return {
        "moments": (1, 2, [stage({}), stage(DEEP, kept), stage(DEEP | WIDE, uneven | measured)]),
        "masks": (
            *(2, 1),
            [
                stage({}),
                stage(DEEP, {"operator": "random_depth", **ramp}),
                stage(DEEP | WIDE, {"operator": "random_width", **ramp}),
            ],
        ),
        "ligo": (
            *(3, 1),
            [
                stage({}),
                stage(DEEP, {"operator": "learn_depth", "learn": few}),
                stage(DEEP | WIDE, {"operator": "learn_width", "learn": few}),
            ],
        ),
        "entries": (3, 2, [stage({}), stage(WIDE, sparkling), stage(DEEP | WIDE, frozen)]),
        "search": (
            *(0, 1),
            [
                stage({}),
                stage(DEEP, {"probe": {"operators": ["direct_depth", "midas"], "steps": 2}}),
                stage(DEEP | WIDE, {"operator": "mup_copy"}),
            ],
        ),
    }


def write_texts(folder: Path) -> None:
    """Write the texts of the corpus: modules of Python's standard library."""
    folder.mkdir(parents=True, exist_ok=True)
    modules: tuple[ModuleType, ...] = (argparse, collections, string, textwrap)
    for module in modules:
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        for number, part in enumerate(source.split("\n\n\n")):
            (folder / f"{module.__name__}-{number}.txt").write_text(part, encoding="utf-8")


def write_instructions(path: Path) -> None:
    """Write instructions in Alpaca's format."""
    records = [
        {"instruction": "Double it.", "input": str(number), "output": f"{2 * number}" + " x" * k}
        for number in range(60)
        for k in (number % 7,)
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
