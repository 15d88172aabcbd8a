"""Run a model step on a simulated GPU: kernels are compiled and launched, but do nothing.

    python tests/helpers/kernels/simulated_gpu.py SETTINGS.json

CPU tensors report a CUDA device, and Triton gets a driver whose load and launch do nothing. The
model, autograd and the launches are real; only the numbers are not. Prints each kernel as JSON:
[name, hash, True if it was in Triton's cache].
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from megagrow.config.schema import StageConfig
from megagrow.model.backends import Backends, KernelWorkload
from megagrow.model.llama import LlamaForCausalLM
from megagrow.model.machine import Machine
from megagrow.model.ops import make_ops
from megagrow_kernels.compiling import record_compilations
from megagrow_kernels.cross_entropy import vocab_gradient_, vocab_statistics

CUDA = torch.device("cuda", 0)
REGISTERS, SPILLS, THREADS = 64, 0, 1024


class Driver:
    """Driver of a simulated H100."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *arguments: (object(), 1, REGISTERS, SPILLS, THREADS),
        unload_module=lambda module: None,
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


def force_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a function to create or move tensors on the CPU instead of the GPU."""

    def on_cpu(*args: Any, **options: Any) -> Tensor:
        if "device" in options:
            options["device"] = "cpu"
        return function(
            *("cpu" if isinstance(arg, torch.device) else arg for arg in args), **options
        )

    return on_cpu


def simulated_gpu(programs: int) -> ExitStack:
    """Simulate a GPU with `programs` multiprocessors within the context."""
    properties = SimpleNamespace(multi_processor_count=programs)
    stack = ExitStack()
    for owner, name, replacement in (
        (Tensor, "device", property(lambda tensor: CUDA)),
        (torch.cuda, "device", lambda device: nullcontext()),
        (torch.cuda, "get_device_capability", lambda device: (9, 0)),
        (torch.cuda, "get_device_properties", lambda device: properties),
    ):
        stack.enter_context(mock.patch.object(owner, name, replacement))
    for owner, name in ((torch, "empty"), (torch, "arange"), (torch, "tensor"), (Tensor, "to")):
        on_cpu = force_cpu(getattr(owner, name))
        stack.enter_context(mock.patch.object(owner, name, on_cpu))
    return stack


def step(stage: StageConfig, sequence: int) -> None:
    """Run one forward and backward pass of the stage's model with its loss, in bf16."""
    model, batch, autocast = (
        stage.model,
        stage.batch.micro_batch_size,
        stage.parallel.zero_stage < 1,
    )
    backends = Backends(attention="triton", norm="triton", pointwise="triton", loss="triton")
    machine = Machine("cuda", 90, triton=True)
    ops = make_ops(backends, machine, KernelWorkload(torch.bfloat16, model.head_dim, packed=True))
    llama = LlamaForCausalLM(model, ops=ops)
    llama = llama if autocast else llama.bfloat16()
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    documents = ops.pack(torch.arange(sequence).expand(batch, -1) // 100)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = llama(ids, torch.arange(sequence).expand(batch, -1), documents)
    gradient = loss_gradient(logits.detach().flatten(0, 1), ids.flatten(), model.vocab_size)
    logits.backward(gradient.view(logits.shape))


def loss_gradient(logits: Tensor, labels: Tensor, real: int) -> Tensor:
    """Return the gradient of the cross-entropy, which overwrites the logits (N, V)."""
    maximum, total, _ = vocab_statistics(logits, labels, 0, real)
    scale = torch.ones_like(maximum)
    vocab_gradient_(logits, labels, maximum, total, scale, torch.zeros_like(scale), 0, real)
    return logits


def main() -> None:
    """Run the steps and print the kernels."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    driver.set_active(Driver())
    with simulated_gpu(settings["programs"]), record_compilations() as kernels:
        for stage in settings["stages"]:
            step(StageConfig.model_validate(stage), settings["sequence"])
    print(json.dumps([[kernel.name, kernel.hash, kernel.cached] for kernel in kernels]))


if __name__ == "__main__":
    main()
