"""Kernel calls of a stage. That a real step launches these and no others is shown in
test_kernel_warmup_compiles.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.config.load import load_run
from megagrow.config.schema import StageConfig
from megagrow.model.backends import Backends
from megagrow.train.kernel_calls import KernelCall, stage_kernels

TRITON = Backends(*["triton"] * 5)
NONE = Backends(attention="sdpa", norm="torch", pointwise="torch", loss="torch")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def stage_of(model: str, **parallel: Any) -> StageConfig:
    """The last stage of the paper's 1.1B run with another model; 8 sequences of 2048 tokens."""
    overrides = [f"stages.1.model={model}"]
    overrides += [f"parallel.{name}={value}" for name, value in parallel.items()]
    return load_run(CONFIGS / "gstack-1.1b.yaml", overrides).stages[1]


def calls(stage: StageConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, Any]]:
    """The arguments of each op, where it is called in one way only."""
    listed = stage_kernels(stage, dtype, TRITON)
    assert len({call.op for call in listed}) == len(listed)
    return {call.op: dict(call.arguments) for call in listed}


def test_a_model_on_one_device():
    found = calls(stage_of("llama-3b"))
    heads = {"batch": 8, "sequence": 2048, "heads": 20, "groups": 4, "head_dim": 128}
    norm = {"rows": 16384, "width": 2560, "dtype": "bfloat16"}
    assert found == {
        "rms_norm": norm,
        "add_rms_norm": norm,
        "rope": heads | {"dtype": "bfloat16", "table_dtype": "bfloat16"},
        "swiglu": {"rows": 16384, "width": 7040, "dtype": "bfloat16"},
        "attention": heads | {"dtype": "bfloat16"},
        "cross_entropy": {
            "rows": 16384,
            "width": 32000,
            "real": 32000,
            "ranks": 1,
            "dtype": "bfloat16",
        },
    }


def test_every_window_has_its_attention():
    stage = stage_of("llama-3b")
    for types, expected in (
        (["sliding_attention"], [256]),
        (["sliding_attention", "full_attention"], [256, None]),
    ):
        changes = {"sliding_window": 256, "layer_types": types}
        model = stage.model.model_copy(update=changes)
        listed = stage_kernels(stage.model_copy(update={"model": model}), torch.bfloat16, TRITON)
        attention = [dict(call.arguments) for call in listed if call.op == "attention"]
        assert [arguments.pop("window", None) for arguments in attention] == expected
        plain = calls(stage)["attention"]
        assert all(arguments == plain for arguments in attention)


def test_tensor_parallel_ranks_have_their_share():
    found = calls(stage_of("llama-3b", tensor_model_parallel_size=4))
    assert (found["attention"]["heads"], found["attention"]["groups"]) == (5, 1)
    assert found["rope"]["heads"] == 5
    assert found["swiglu"]["width"] == 1760
    assert found["rms_norm"]["rows"] == 16384
    assert found["cross_entropy"]["width"] == 8000
    assert found["cross_entropy"]["ranks"] == 4


def test_context_parallel_ranks_have_their_share():
    heads = {"batch": 8, "heads": 20, "groups": 4, "head_dim": 128, "dtype": "bfloat16"}
    stage = stage_of("llama-3b", context_parallel_size=2)
    listed = stage_kernels(stage, torch.bfloat16, TRITON)
    assert [dict(call.arguments) for call in listed if call.op == "attention"] == [
        heads | {"sequence": 512},
        heads | {"sequence": 2048, "queries": 512},
    ]
    found = calls(stage_of("llama-3b", context_parallel_size=2, cp_comm_type="a2a"))
    assert found["attention"] == heads | {"sequence": 2048, "heads": 10, "groups": 2}
    assert found["rope"] == {**heads, "sequence": 1024, "table_dtype": "bfloat16"}
    assert found["rms_norm"]["rows"] == found["cross_entropy"]["rows"] == 8192


def test_norms_of_a_spread_sequence_see_their_part_of_it():
    stage = stage_of("llama-3b", tensor_model_parallel_size=4, sequence_parallel="true")
    found = calls(stage)
    assert found["rms_norm"]["rows"] == found["add_rms_norm"]["rows"] == 4096
    assert found["swiglu"]["rows"] == 16384


SAMBA = {
    "model_type": "samba",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 512,
    "intermediate_size": 640,
    "vocab_size": 1024,
}


def family(**model: Any) -> StageConfig:
    """A stage with two tensor-parallel ranks and 2 sequences of a small model."""
    parallel = {"tensor_model_parallel_size": 2, "zero_stage": 0}
    batch = {"global_batch_size": 2, "micro_batch_size": 2}
    stage = {"model": SAMBA | model, "parallel": parallel, "batch": batch, "tokens": 1}
    data = {"train": "corpus", "sequence_length": 2048}
    return StageConfig.model_validate(stage | {"data": data, "optimizer": {"lr": 1e-3}})


def test_a_hybrid_with_autocast():
    """Weights outside of matrix products are in fp32. SwiGLU has the widths of both types."""
    found = [
        (call.op, dict(call.arguments)) for call in stage_kernels(family(), torch.bfloat16, TRITON)
    ]
    mixed = {"dtype": "bfloat16", "parameter_dtype": "float32"}
    scanned = {"batch": 2, "sequence": 2048, "channels": 256} | mixed
    assert ("causal_conv", scanned | {"taps": 4}) in found
    assert ("selective_scan", scanned | {"states": 16}) in found
    widths = {arguments["width"] for op, arguments in found if op == "swiglu"}
    assert widths == {256, 320}
    (attention,) = (arguments for op, arguments in found if op == "attention")
    assert (attention["heads"], attention["window"]) == (2, 512)
    norms = [arguments for op, arguments in found if op == "rms_norm"]
    assert norms == [{"rows": 4096, "width": 256, "dtype": "float32"}]


@pytest.mark.parametrize(
    ("model_type", "norms"),
    [
        ("qwen3", [(4096, 256, "float32"), (2 * 4096, 64, "bfloat16"), (4096, 64, "bfloat16")]),
        ("olmo2", [(4096, 256, "bfloat16")]),
    ],
)
def test_norms_of_families(model_type: str, norms: list[tuple[int, int, str]]) -> None:
    """Full-width norms of sliced heads are computed by torch."""
    stage = family(model_type=model_type, sliding_window=None)
    listed = stage_kernels(stage, torch.bfloat16, TRITON)
    found = [dict(call.arguments) for call in listed if call.op == "rms_norm"]
    assert [(each["rows"], each["width"], each["dtype"]) for each in found] == norms


def test_ranks_with_padding_have_kernels_of_their_own():
    stage = stage_of("llama-3b", tensor_model_parallel_size=4)
    model = stage.model.model_copy(update={"vocab_size": 32001})
    listed = stage_kernels(stage.model_copy(update={"model": model}), torch.bfloat16, TRITON)
    real = [dict(c.arguments)["real"] for c in listed if c.op == "cross_entropy"]
    assert real == [8001, 7998]
    assert {dict(c.arguments)["width"] for c in listed if c.op == "cross_entropy"} == {8001}


@pytest.mark.parametrize(
    ("zero", "dtype", "norm", "tables"),
    [
        (1, torch.bfloat16, "bfloat16", "bfloat16"),
        (0, torch.bfloat16, "float32", "float32"),
        (0, torch.float32, "float32", "float32"),
    ],
)
def test_without_zero_bf16_is_autocast(zero, dtype, norm, tables):
    found = calls(stage_of("llama-3b", zero_stage=zero), dtype)
    assert found["rms_norm"]["dtype"] == norm
    assert found["rope"]["table_dtype"] == tables
    for op in ("rope", "swiglu", "attention", "cross_entropy"):
        assert found[op]["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("backend", "ops"),
    [
        ("norm", {"rms_norm", "add_rms_norm"}),
        ("pointwise", {"rope", "swiglu"}),
        ("attention", {"attention"}),
        ("loss", {"cross_entropy"}),
    ],
)
def test_only_what_triton_computes(backend, ops):
    backends = Backends(**(vars_of(NONE) | {backend: "triton"}))
    listed = stage_kernels(stage_of("llama-3b"), torch.bfloat16, backends)
    assert {call.op for call in listed} == ops
    assert stage_kernels(stage_of("llama-3b"), torch.bfloat16, NONE) == ()


def vars_of(backends: Backends) -> dict[str, str]:
    names = ("attention", "norm", "pointwise", "loss")
    return {name: getattr(backends, name) for name in names}


def test_as_json():
    assert KernelCall("swiglu", (("rows", 4), ("dtype", "bfloat16"))).as_json() == [
        "swiglu",
        {"rows": 4, "dtype": "bfloat16"},
    ]
