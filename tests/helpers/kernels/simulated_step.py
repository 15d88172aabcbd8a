"""Run a model step on a simulated GPU: kernels are compiled and launched, but do nothing.

    python -m tests.helpers.kernels.simulated_step SETTINGS.json

The model, autograd and the launches are real; only the numbers are not. Prints each kernel as JSON:
[name, hash, True if it was in Triton's cache].
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.driver import driver

from megagrow.config.schema import StageConfig
from megagrow.model.backends import Backends, KernelWorkload
from megagrow.model.decoder import CausalLM
from megagrow.model.machine import Machine
from megagrow.model.ops import make_ops
from megagrow_kernels.compiling import record_compilations
from megagrow_kernels.cross_entropy import vocab_gradient_, vocab_statistics
from tools.benchmarks.kernels.simulated_gpu import Driver, simulated_gpu


def step(stage: StageConfig) -> None:
    """Run one forward and backward pass of the stage's model with its loss, in bf16."""
    model, batch, sequence = stage.model, stage.batch.micro_batch_size, stage.data.sequence_length
    autocast = stage.parallel.zero_stage < 1
    backends = Backends(*["triton"] * 5)
    machine = Machine("cuda", 90, triton=True)
    ops = make_ops(backends, machine, KernelWorkload(torch.bfloat16, model.head_dim, packed=True))
    llama = CausalLM(model, ops=ops)
    llama = llama if autocast else llama.bfloat16()
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    documents = ops.pack(torch.arange(sequence).expand(batch, -1) // 100)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # Tensors report a CUDA device, and are dispatched as those of a CPU.
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", autocast)
        logits = llama(ids, torch.arange(sequence).expand(batch, -1), documents)
        torch.set_autocast_enabled("cuda", False)
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
            step(StageConfig.model_validate(stage))
    print(json.dumps([[kernel.name, kernel.hash, kernel.cached] for kernel in kernels]))


if __name__ == "__main__":
    main()
