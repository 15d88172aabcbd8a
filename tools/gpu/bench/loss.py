"""The cross-entropy of a rank's rows of the vocabulary, and together with the head before it.

Both are measured forward and backward together, since some compute the gradient on the way forward.
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
from megagrow.parallel.process_groups import Topology, destroy_topology, make_topology
from megagrow_kernels.cross_entropy import vocab_gradient_, vocab_statistics
from tools.gpu.bench import others
from tools.gpu.bench.case import OURS, Case, Place, Record, Result
from tools.gpu.bench.clock import Call
from tools.gpu.bench.work import linear_cross_entropy_work, row_work

Contenders = dict[str, Callable[[], Result]]

VOCABULARIES = ((8192, 131072), (16384, 32000))
"""Tokens, and rows of the vocabulary."""
HEADS = ((8192, 4096, 131072), (16384, 2048, 32000))
"""Tokens, hidden size, rows of the vocabulary: a large one, and that of the 1.1B model."""


def cases(place: Place) -> Iterator[Case]:
    """Cross-entropy alone, then with the head."""
    for tokens, vocabulary in [(5, 70)] if place.smoke else VOCABULARIES:
        yield _cross_entropy(place, tokens, vocabulary)
    with one_rank(place) as topology:
        for shape in _heads(place):
            yield _linear_cross_entropy(place, topology, *shape)


def memory(place: Place) -> Iterator[Record]:
    """Peak memory of head and loss, beyond what was there before and the two gradients."""
    with one_rank(place) as topology:
        for shape in _heads(place):
            case = _linear_cross_entropy(place, topology, *shape)
            logits = shape[0] * shape[2] * case.leaves[0].element_size()
            for name, call in case.contenders.items():
                record = {"kind": "memory", "op": case.op, "case": case.name, "by": name}
                record["logits_bytes"] = logits
                try:
                    record["extra_bytes"] = extra_bytes(call, case.leaves, place)
                except Exception as error:  # whatever other libraries raise
                    record["problem"] = f"{type(error).__name__}: {error}".splitlines()[0]
                yield record


def extra_bytes(call: Callable[[], Result], leaves: tuple[Tensor, ...], place: Place) -> int:
    """What a forward and backward pass adds to the memory in use at its peak, but for the gradients
    of the leaves; 0 without a GPU."""
    kept = sum(x.numel() * x.element_size() for x in leaves)
    gc.collect()
    if not place.smoke:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(call(), leaves)
    del gradients
    return 0 if place.smoke else torch.cuda.max_memory_allocated() - before - kept


@contextmanager
def one_rank(place: Place) -> Iterator[Topology]:
    """A job of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    topology = make_topology(1, place.device)
    try:
        yield topology
    finally:
        destroy_topology(topology)
        dist.destroy_process_group()


def _heads(place: Place) -> tuple[tuple[int, int, int], ...]:
    return ((9, 16, 70),) if place.smoke else HEADS


def _cross_entropy(place: Place, tokens: int, vocabulary: int) -> Case:
    source = place.draw(tokens, vocabulary, gradient=False)
    logits = source.clone().requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device=place.device)
    ones, zeros = (torch.full((tokens,), x, device=place.device) for x in (1.0, 0.0))

    def ours() -> Tensor:
        with torch.no_grad():
            maximum, total, target = vocab_statistics(logits, labels, 0, vocabulary)
            vocab_gradient_(logits, labels, maximum, total, ones, zeros, 0, vocabulary)
        return total.log() + maximum - target

    def differentiated(loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(loss(logits, labels, reduction="sum"), logits)[0]

    contenders: Contenders = {
        OURS: ours,
        "compile": differentiated(place.compiled(F.cross_entropy)),
    }
    if liger := others.liger("liger_cross_entropy"):
        contenders["liger"] = differentiated(liger)
    return Case(
        "cross_entropy",
        f"{tokens} x {vocabulary}",
        contenders,
        (),
        *row_work("cross_entropy", logits.numel(), logits.element_size()),
        together=True,
        restore=_copying(source, logits.detach()),
    )


def _linear_cross_entropy(
    place: Place, topology: Topology, tokens: int, hidden: int, vocabulary: int
) -> Case:
    x, weight = place.draw(1, tokens, hidden), place.draw(vocabulary, hidden)
    labels = torch.randint(vocabulary, (1, tokens), device=place.device)
    loss = triton_loss()
    flat, flat_labels = x.flatten(0, 1), labels.flatten()
    contenders: Contenders = {
        OURS: lambda: linear_cross_entropy(x, weight, labels, vocabulary, topology, loss),
        "plain": lambda: cross_entropy(x @ weight.t(), labels, vocabulary, topology, loss),
    }
    if liger := others.liger("liger_fused_linear_cross_entropy"):
        contenders["liger"] = lambda: liger(flat, weight, flat_labels, reduction="sum")
    if cut := others.cut_cross_entropy():
        contenders["cut-cross-entropy"] = lambda: cut(flat, weight, flat_labels, reduction="sum")
    name = f"{tokens} x {hidden} x {vocabulary}"
    work = linear_cross_entropy_work(tokens, hidden, vocabulary)
    return Case("linear_cross_entropy", name, contenders, (x, weight), work, together=True)


def _copying(source: Tensor, target: Tensor) -> Call:
    return lambda: target.copy_(source)
