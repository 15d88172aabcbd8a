"""A step of a model on a GPU that is not there: kernels are compiled as if to run, and do nothing.

    python tests/helpers/kernels/pretended_gpu.py SETTINGS.json

Whatever is on the CPU says that it is on a GPU, and Triton finds a driver that loads and launches
everything. So the model, torch's autograd and the launches are the real ones; only the numbers are
not. Prints each kernel as JSON: [its name, its hash, whether Triton's cache had it].
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
from megagrow_kernels.compiling import watched
from megagrow_kernels.cross_entropy import vocab_gradient_, vocab_statistics

CUDA = torch.device("cuda", 0)
REGISTERS, SPILLS, THREADS = 64, 0, 1024


class Driver:
    """An H100's, for whoever launches."""

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


def on_the_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What is to be made on the GPU, or to be moved there, is on the CPU."""

    def made(*args: Any, **options: Any) -> Tensor:
        if "device" in options:
            options["device"] = "cpu"
        return function(
            *("cpu" if isinstance(arg, torch.device) else arg for arg in args), **options
        )

    return made


def pretending(programs: int) -> ExitStack:
    """Within it, the GPU is there, with so many multiprocessors."""
    properties = SimpleNamespace(multi_processor_count=programs)
    stack = ExitStack()
    for where, name, what in (
        (Tensor, "device", property(lambda tensor: CUDA)),
        (torch.cuda, "device", lambda device: nullcontext()),
        (torch.cuda, "get_device_capability", lambda device: (9, 0)),
        (torch.cuda, "get_device_properties", lambda device: properties),
    ):
        stack.enter_context(mock.patch.object(where, name, what))
    for where, name in ((torch, "empty"), (torch, "arange"), (torch, "tensor"), (Tensor, "to")):
        made = on_the_cpu(getattr(where, name))
        stack.enter_context(mock.patch.object(where, name, made))
    return stack


def step(stage: StageConfig, sequence: int) -> None:
    """One forward and backward pass of the stage's model with its loss, in bf16."""
    model, batch, autocast = (
        stage.model,
        stage.batch.micro_batch_size,
        stage.parallel.zero_stage < 1,
    )
    backends = Backends(attention="triton", norm="triton", pointwise="triton", loss="triton")
    machine = Machine("cuda", 90, triton=True, checked=True)
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
    """That of the cross-entropy, which takes the memory of the logits (N, V)."""
    maximum, total, _ = vocab_statistics(logits, labels, 0, real)
    scale = torch.ones_like(maximum)
    vocab_gradient_(logits, labels, maximum, total, scale, torch.zeros_like(scale), 0, real)
    return logits


def main() -> None:
    """Takes the steps and prints the kernels."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    driver.set_active(Driver())
    with pretending(settings["programs"]), watched() as kernels:
        for stage in settings["stages"]:
            step(StageConfig.model_validate(stage), settings["sequence"])
    print(json.dumps([[kernel.name, kernel.hash, kernel.cached] for kernel in kernels]))


if __name__ == "__main__":
    main()
