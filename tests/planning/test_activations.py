"""Planned activation memory, compared with the memory that a real forward pass keeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megagrow.config.schema import StageConfig
from megagrow.model.backends import Backends, KernelWorkload
from megagrow.model.decoder import CausalLM
from megagrow.model.machine import machine_of
from megagrow.model.ops import PLAIN, make_ops
from megagrow.planning.memory import stage_memory

MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
FAMILIES = {
    "llama": MODEL,
    "qwen2": MODEL | {"model_type": "qwen2"},
    "qwen3": MODEL | {"model_type": "qwen3", "num_key_value_heads": 2},
    "olmo2": MODEL | {"model_type": "olmo2"},
    "samba": MODEL | {"model_type": "samba"},
}
LENGTH = 32
TOKENS = 2 * LENGTH
CHECKPOINTING = ("none", "selective")


def stage_of(checkpointing: str, family: str = "llama", **kernels: str) -> StageConfig:
    return StageConfig.model_validate(
        {
            "model": FAMILIES[family],
            "data": {"train": "corpus", "sequence_length": LENGTH},
            "tokens": 1,
            "parallel": {"activation_checkpointing": checkpointing},
            "batch": {"global_batch_size": 2, "micro_batch_size": 2},
            "optimizer": {"lr": 1.0},
            "kernels": kernels,
        }
    )


class FusedNorm(torch.autograd.Function):
    """Keeps what the fused norm of a GPU keeps: its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


class FusedSwiglu(torch.autograd.Function):
    """Keeps what Triton's SwiGLU keeps: its inputs."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


class FusedConvolution(torch.autograd.Function):
    """Keeps what Triton's convolution keeps: its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, starts: None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


class FusedScan(torch.autograd.Function):
    """Keeps what Triton's scan keeps: its inputs, and a state in fp32 for each chunk of 64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, *inputs: Any) -> Tensor:
        states = x.new_zeros(len(x), -(-x.shape[1] // 64), *A.shape, dtype=torch.float32)
        ctx.save_for_backward(x, dt, A, *inputs[:-1], states)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


class Storages(TorchDispatchMode):
    """Memory of the results of all operations within the context."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._seen[StorageWeakRef(storage)] = storage.nbytes()
        return outputs

    def alive(self, outside: set[StorageWeakRef]) -> int:
        """Return the bytes that are still in use, without some storages."""
        alive = {storage for storage in self._seen if not storage.expired()}
        return sum(self._seen[storage] for storage in alive - outside)


def kept_by_autograd(model: CausalLM) -> int:
    """Return the bytes kept for the backward pass of a micro-batch, without weights and logits."""
    ids, positions = (
        torch.zeros(2, LENGTH, dtype=torch.long),
        torch.arange(LENGTH).expand(2, LENGTH),
    )
    with Storages() as storages:
        logits = model(ids, positions)
    outside = {
        StorageWeakRef(x.untyped_storage()) for x in (*model.parameters(), ids, positions, logits)
    }
    return storages.alive(outside)


TABLES = 2 * TOKENS * 16
"""Elements of the rotary tables, which the model keeps and the plan does not count."""


def without_tokens(stage: StageConfig, bf16: bool, torch_scan: bool) -> int:
    """Return the bytes that a model keeps and the plan does not count, as they are few: rotary
    tables; and of a Mamba layer A and its exponential, with torch's scan the starts of documents
    and in bf16 copies of the convolution's weight and of D in fp32."""
    tables, model = TABLES * (2 if bf16 else 4), stage.model
    if model.mamba_d_inner is None:
        return tables
    assert model.mamba_d_state and model.mamba_d_conv
    numbers = 2 * model.mamba_d_state + (model.mamba_d_conv + 1) * (bf16 and torch_scan)
    return tables + 4 * model.mamba_d_inner * numbers + TOKENS * torch_scan


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("pointwise", ["torch", "triton"])
def test_activations_on_a_gpu(pointwise: str, bf16: bool, checkpointing: str, family: str) -> None:
    stage = stage_of(checkpointing, family, pointwise=pointwise, scan="triton")
    planned = stage_memory(stage, 1, bf16).activations()
    ops = replace(PLAIN, rms_norm=FusedNorm.apply, causal_conv=FusedConvolution.apply)
    ops = replace(ops, selective_scan=FusedScan.apply)
    if pointwise == "triton":
        ops = replace(ops, swiglu=FusedSwiglu.apply)
    model = CausalLM(stage.model, checkpointing, ops)
    model.to(torch.bfloat16 if bf16 else torch.float32)
    assert kept_by_autograd(model) == planned + without_tokens(stage, bf16, torch_scan=False)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize(
    ("family", "attention", "bf16"),
    [
        ("llama", "sdpa", False),
        ("llama", "sdpa", True),
        ("llama", "reference", False),
        ("samba", "reference", False),
        ("samba", "reference", True),
    ],
)
def test_activations_on_a_cpu(family: str, attention: str, bf16: bool, checkpointing: str) -> None:
    """The reference composes attention of operations."""
    stage = stage_of(checkpointing, family, attention=attention)
    planned = stage_memory(stage, 1, bf16, on_cpu=True).activations()
    backends = Backends(attention=attention, norm="torch", pointwise="torch", loss="torch")
    work = KernelWorkload(torch.float32, 16, packed=False)
    ops = make_ops(backends, machine_of(torch.device("cpu")), work)
    model = CausalLM(stage.model, checkpointing, ops)
    model.to(torch.bfloat16 if bf16 else torch.float32)
    assert kept_by_autograd(model) == planned + without_tokens(stage, bf16, torch_scan=True)
