"""Categories of device memory, from the tensors of an engine and from where memory is allocated."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from megagrow.parallel.engine import ZeroEngine
from megagrow.simulation.memory import Allocation, MemoryLog

CATEGORIES = (
    *("weights", "gathered weights", "master weights", "moments", "gradients", "buckets"),
    *("activations", "logits", "other"),
)

_LOSS = "megagrow/parallel/loss.py"
_PARAMETERS = "deepspeed/runtime/zero/partition_parameters.py"
_FLAT_GRADIENTS = "megagrow/parallel/flat_gradients.py"
_TIED_HEAD = "megagrow/parallel/pipeline/tied_head.py"
_REDUCTION = (
    *("deepspeed/", "megagrow/parallel/replicated", "megagrow/parallel/bucket_reduction"),
    *(_FLAT_GRADIENTS, "megagrow/parallel/flat_optimizer"),
)


def label_state(memory: MemoryLog, engine: ZeroEngine) -> None:
    """Label weights, optimizer state and the gradients of a new engine."""
    module = engine._engine.module
    sums = getattr(engine._engine.optimizer, "grad_partitions_flat_buffer", None)  # of ZeRO 3
    memory.label([] if sums is None else [sums], "gradients")
    memory.label((parameter.data for parameter in module.parameters()), "weights")
    partitions = [getattr(each, "ds_tensor", None) for each in module.parameters()]
    memory.label((part for part in partitions if part is not None), "weights")
    for kinds in engine.storage().values():
        for kind, values in kinds.items():
            memory.label([values], "master weights" if kind == "fp32" else "moments")
    for parameter in module.parameters():
        parameter.register_hook(lambda gradient: memory.label([gradient], "gradients"))


@contextmanager
def phases(memory: MemoryLog, engine: ZeroEngine) -> Iterator[None]:
    """Context in which the calls of an engine are the phases `forward`, `backward` and `step`."""

    def in_phase(name: str) -> Callable[..., Any]:
        call = getattr(engine, name)

        def run(*args: Any, **options: Any) -> Any:
            memory.enter(name)
            return call(*args, **options)

        return run

    with ExitStack() as stack:
        for name in ("forward", "backward", "step"):
            stack.enter_context(patch.object(engine, name, in_phase(name)))
        yield


def category_of(allocation: Allocation) -> str:
    """Return the category of an allocation."""
    if allocation.category:
        return allocation.category
    site = allocation.site
    if _LOSS in (site.file, site.caller.split(":")[0]) or site.function == "Head.forward":
        return "logits"
    if site.file == _PARAMETERS:
        return "gathered weights"
    if site.file == _TIED_HEAD:
        return "weights" if site.function == "_own_copy" else "gradients"
    if site.file == _FLAT_GRADIENTS:
        return "gradients"
    if site.file.startswith(_REDUCTION):
        return "buckets"
    return "activations" if allocation.phase in ("forward", "backward") else "other"
