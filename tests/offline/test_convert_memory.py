"""Other programs' files are written and read in less memory than the largest tensor takes."""

import ctypes
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megagrow.config.schema import ModelConfig
from megagrow.offline.convert import (
    export_megatron,
    export_universal,
    import_megatron,
    import_universal,
)
from megagrow.offline.request import Request
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.reshard.models import layout_of

MIB = 2**20
MODEL = ModelConfig(
    num_hidden_layers=1,
    hidden_size=512,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=1024,
    vocab_size=20_001,
    tie_word_embeddings=True,
)
LARGEST = 4 * 20_001 * 512
"""39 MiB; with the moments three times that, on top of which one layer comes."""

BOUND = 30 * MIB
"""Measured: 4 to 15 MiB. Pieces of 4 MiB in several copies, and Python objects."""


def kib_of(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise AssertionError(f"/proc/self/status has no {field}")


def taken(work: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    """The most bytes that were resident during the work, over what was before."""
    before = kib_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    work(*arguments, **options)
    return 1024 * (kib_of("VmHWM") - before)


def test_no_tensor_is_ever_whole(tmp_path):
    m_mmap_threshold = -3  # what is freed goes back to the system at once
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 64 * 1024) == 1
    plan = parameter_plan(MODEL, 1)
    zeros = {n: dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), torch.zeros(s.rows, s.cols))
             for n, s in plan.items()}  # fmt: skip
    write_checkpoint(tmp_path / "in", MODEL, layout_of(MODEL, 1, 2, 1), zeros)
    del zeros
    console = Console(file=io.StringIO())
    options: dict[str, Any] = {"to": None, "zero_stage": 2, "dp": 3, "tp": 1}
    options |= {"weight_decay_on": "all", "memory": "16MiB"}
    found = {
        "universal-export": taken(export_universal, tmp_path / "in", tmp_path / "u", console),
        "megatron-export": taken(
            export_megatron,
            tmp_path / "in",
            tmp_path / "m",
            tp=2,
            divisible_by=128,
            dtype="bfloat16",
            console=console,
        ),
    }
    for name, work in (("u", import_universal), ("m", import_megatron)):
        request = Request(
            form="checkpoint", source=tmp_path / name, out=tmp_path / f"{name}-in", **options
        )
        found[f"{name}-import"] = taken(work, request, console)
    assert all(size < BOUND < LARGEST for size in found.values()), found
