"""Growths of a tiny model by every operator that can grow files, for tests."""

import io
import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megagrow.config.schema import ModelConfig
from megagrow.offline.grow import grow_files
from megagrow.offline.request import Request

BASE = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 37,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-3,
}
WIDE = {
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "head_dim": 4,
}
ANY = WIDE | {"hidden_size": 24, "intermediate_size": 40}
LOW_EPS = {"rms_norm_eps": 1e-3 * 16 / 24}
DEEP = {"num_hidden_layers": 4}

Growth = tuple[dict[str, Any], dict[str, Any]]
"""Changes to BASE, and the options of the growth."""

GROWTHS: dict[str, Growth] = {
    "stack": (DEEP, {"operator": "direct_depth"}),
    "interpolate, reset": (
        DEEP,
        {"operator": "direct_depth", "layer_map": "interpolate", "optimizer_state": "reset"},
    ),
    "zero depth": (DEEP, {"operator": "zero_depth"}),
    "random depth": (DEEP, {"operator": "random_depth", "ramp_tokens": 100}),
    "from no layers": (DEEP, {"operator": "random_depth", "ramp_tokens": 0}),
    "random, unmasked": (
        DEEP | WIDE,
        {"operator": ["random_depth", "direct_width"], "layer_map": [-1, 0, 1, -1]}
        | {"ramp_tokens": 0},
    ),
    "mixing noise": (DEEP, {"operator": "direct_depth", "mixing_noise": 0.2}),
    "solar": ({"num_hidden_layers": 4}, {"operator": "solar"}),
    "copy": (WIDE, {"operator": "direct_width"}),
    "tiled, uneven": (
        WIDE,
        {"operator": "direct_width", "copy_order": "tiled", "copy_split": "uneven"},
    ),
    "net2net, keep_second_moment": (
        WIDE,
        {"operator": "net2net_width", "optimizer_state": "keep_second_moment"},
    ),
    "staged": (WIDE, {"operator": "staged_width"}),
    "fpi": (WIDE, {"operator": "bert2bert_fpi"}),
    "aki": (WIDE, {"operator": "bert2bert_aki"}),
    "hypercloning": (WIDE, {"operator": "hypercloning"}),
    "mup": (WIDE, {"operator": "mup_copy"}),
    "sparkling": (WIDE, {"operator": "sparkling"}),
    "zero width": (ANY | LOW_EPS, {"operator": "zero_width"}),
    "random width": (ANY, {"operator": "random_width", "ramp_tokens": 100}),
    "lemon": (ANY | LOW_EPS, {"operator": "lemon"}),
    "isometric": ({"hidden_size": 24, "head_dim": 4} | LOW_EPS, {"operator": "isometric"}),
    "head_dim": ({"head_dim": 8}, {"operator": "head_dim"}),
    "vocabulary": ({"vocab_size": 41}, {"operator": "vocabulary"}),
    "depth and width": (DEEP | WIDE, {"operator": ["zero_depth", "direct_width"]}),
}


def source_of(name: str) -> ModelConfig:
    """The source of one of GROWTHS."""
    return base(**{"num_hidden_layers": 0} if name == "from no layers" else {})


def base(**changes: Any) -> ModelConfig:
    """The source."""
    return ModelConfig(**BASE | changes)


def model_file(path: Path, changes: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(BASE | changes))
    return str(path)


def overrides(options: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"growth.{key}={json.dumps(value)}" for key, value in options.items())


def grow(**request: Any) -> str:
    """Carries out a request; returns what was said."""
    said = io.StringIO()
    grow_files(Request(**request), Console(file=said, width=300))
    return said.getvalue()


def convert(how: Any, source: Path, out: Path, form: str = "checkpoint", **options: Any) -> str:
    """Carries out a conversion; returns what was said."""
    said = io.StringIO()
    request = Request(source=source, out=out, form=form, memory="20MiB", **options)
    how(request, Console(file=said, width=300))
    return said.getvalue()
