"""Benchmark of vocabulary-parallel cross-entropy, alone and with the output projection.

Both are measured forward and backward together, since some implementations compute the gradient in
the forward pass.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagrow.model.ops import triton_loss
from megagrow.parallel.loss import cross_entropy, linear_cross_entropy
from megagrow.parallel.process_groups import Topology, make_topology
from megagrow_kernels.cross_entropy import vocab_gradient_, vocab_statistics
from tools.gpu.bench import baselines
from tools.gpu.bench.case import OURS, BenchmarkCase, DeviceSetup, Record, Result
from tools.gpu.bench.timer import Call
from tools.gpu.bench.work import linear_cross_entropy_work, row_work

Implementations = dict[str, Callable[[], Result]]

VOCABULARIES = ((8192, 131072), (16384, 32000))
"""Shapes: tokens, vocabulary rows."""
HEADS = ((8192, 4096, 131072), (16384, 2048, 32000))
"""Shapes: tokens, hidden size, vocabulary rows. A large shape, and that of the 1.1B model."""


def cases(setup: DeviceSetup) -> Iterator[BenchmarkCase]:
    """Yield cross-entropy cases alone, then with the output projection."""
    for tokens, vocabulary in [(5, 70)] if setup.smoke else VOCABULARIES:
        yield _cross_entropy(setup, tokens, vocabulary)
    with single_rank(setup) as topology:
        for shape in _heads(setup):
            yield _linear_cross_entropy(setup, topology, *shape)


def memory(setup: DeviceSetup) -> Iterator[Record]:
    """Yield the peak memory of projection and loss, excluding earlier allocations and gradients."""
    with single_rank(setup) as topology:
        for shape in _heads(setup):
            case = _linear_cross_entropy(setup, topology, *shape)
            logits = shape[0] * shape[2] * case.leaves[0].element_size()
            for name, call in case.implementations.items():
                record = {"kind": "memory", "op": case.op, "case": case.name, "by": name}
                record["logits_bytes"] = logits
                try:
                    record["extra_bytes"] = extra_bytes(call, case.leaves, setup)
                except Exception as error:  # baselines raise arbitrary exceptions
                    record["problem"] = f"{type(error).__name__}: {error}".splitlines()[0]
                yield record


def extra_bytes(call: Callable[[], Result], leaves: tuple[Tensor, ...], setup: DeviceSetup) -> int:
    """Return the peak memory added by a forward and backward pass, in bytes.

    The gradients of the leaves are excluded. 0 without a GPU.
    """
    gradient_bytes = sum(x.numel() * x.element_size() for x in leaves)
    gc.collect()
    if not setup.smoke:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        baseline = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(call(), leaves)
    del gradients
    return 0 if setup.smoke else torch.cuda.max_memory_allocated() - baseline - gradient_bytes


@contextmanager
def single_rank(setup: DeviceSetup) -> Iterator[Topology]:
    """Create a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield make_topology(1, setup.device)
    finally:
        dist.destroy_process_group()


def _heads(setup: DeviceSetup) -> tuple[tuple[int, int, int], ...]:
    return ((9, 16, 70),) if setup.smoke else HEADS


def _cross_entropy(setup: DeviceSetup, tokens: int, vocabulary: int) -> BenchmarkCase:
    source = setup.draw(tokens, vocabulary, gradient=False)
    logits = source.clone().requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=setup.device)
    ones, zeros = (torch.full((tokens,), x, device=setup.device) for x in (1.0, 0.0))

    def ours() -> Tensor:
        with torch.no_grad():
            maximum, total, target = vocab_statistics(logits, labels, 0, vocabulary)
            vocab_gradient_(logits, labels, maximum, total, ones, zeros, 0, vocabulary)
        return total.log() + maximum - target

    def differentiated(loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(loss(logits, labels, reduction="sum"), logits)[0]

    implementations: Implementations = {
        OURS: ours,
        "compile": differentiated(setup.compile(F.cross_entropy)),
    }
    if liger := baselines.liger("liger_cross_entropy"):
        implementations["liger"] = differentiated(liger)
    return BenchmarkCase(
        "cross_entropy",
        f"{tokens} x {vocabulary}",
        implementations,
        (),
        *row_work("cross_entropy", logits.numel(), logits.element_size()),
        fused=True,
        restore=_copy_call(source, logits.detach()),
    )


def _linear_cross_entropy(
    setup: DeviceSetup, topology: Topology, tokens: int, hidden: int, vocabulary: int
) -> BenchmarkCase:
    x, weight = setup.draw(1, tokens, hidden), setup.draw(vocabulary, hidden)
    labels = torch.randint(vocabulary, (1, tokens), device=setup.device)
    loss = triton_loss()
    flat, flat_labels = x.flatten(0, 1), labels.flatten()
    implementations: Implementations = {
        OURS: lambda: linear_cross_entropy(x, weight, labels, vocabulary, topology, loss)[0],
        "plain": lambda: cross_entropy(x @ weight.t(), labels, vocabulary, topology, loss)[0],
    }
    if liger := baselines.liger("liger_fused_linear_cross_entropy"):
        implementations["liger"] = lambda: liger(flat, weight, flat_labels, reduction="sum")
    if cut := baselines.cut_cross_entropy():
        implementations["cut-cross-entropy"] = lambda: cut(
            flat, weight, flat_labels, reduction="sum"
        )
    name = f"{tokens} x {hidden} x {vocabulary}"
    work = linear_cross_entropy_work(tokens, hidden, vocabulary)
    return BenchmarkCase(
        "linear_cross_entropy", name, implementations, (x, weight), work, fused=True
    )


def _copy_call(source: Tensor, target: Tensor) -> Call:
    return lambda: target.copy_(source)
