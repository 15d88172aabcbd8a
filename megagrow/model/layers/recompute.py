"""Recomputation of cheap functions in the backward pass, in place of keeping their results.

The matrix products that read the output of a norm keep it for the backward pass.
`torch.utils.checkpoint` can drop it only together with these products, and would repeat them.
`Recomputed` drops a function's output from the operations that read it, as Megatron-LM's
`CheckpointWithoutOutput` does (Korthikanti et al. 2022, section 5).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Recomputed:
    """Function of tensors that are kept, whose results are computed again in the backward pass.

    The results are what autograd saves in the function (`run`) and its output where other
    operations save it (`reads`). The first use in the backward pass runs the function again; each
    result is released after its last use. The function must be deterministic and must not write to
    its inputs.
    """

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        self._function, self._inputs = function, inputs
        self._saved: dict[int, Tensor] = {}
        self._count = 0
        self._output: Tensor | None = None
        self._reads = 0

    def run(self) -> Tensor:
        """Return the output; what autograd saves in the function is recomputed, inputs are kept."""

        kept = {_memory(x) for x in self._inputs}

        def pack(tensor: Tensor) -> Tensor | int:
            if _memory(tensor) in kept:
                return tensor
            self._count += 1
            return self._count - 1

        with saved_tensors_hooks(pack, self._unpack_saved):
            return self._function(*self._inputs)

    @contextmanager
    def reads(self, output: Tensor) -> Iterator[None]:
        """Recompute `output`, the function's output, for all operations within the context."""
        dropped = _memory(output)  # a hook is kept with its tensor, so it must not hold the output

        def pack(tensor: Tensor) -> Any:
            if _memory(tensor) != dropped:
                return tensor
            self._reads += 1
            return tensor.size(), tensor.stride(), tensor.storage_offset()

        with saved_tensors_hooks(pack, self._unpack_output):
            yield

    def _unpack_saved(self, packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in self._saved:
            self._run_again()
        return self._saved.pop(packed)

    def _unpack_output(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self._output is None:
            self._run_again()
        assert self._output is not None
        output = self._output.as_strided(*packed)
        self._reads -= 1
        if self._reads <= 0:
            self._output = None
        return output

    def _run_again(self) -> None:
        inputs = [x.detach().requires_grad_(x.requires_grad) for x in self._inputs]
        kept, saved = {_memory(x) for x in inputs}, []

        def pack(tensor: Tensor) -> None:
            if _memory(tensor) not in kept:
                saved.append(tensor.detach())

        with torch.set_grad_enabled(self._count > 0), saved_tensors_hooks(pack, _never):
            output = self._function(*inputs)
        self._saved = dict(enumerate(saved))
        self._output = output.detach() if self._reads > 0 else None


def _memory(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory, which is also defined for tensors without data."""
    return tensor.untyped_storage()._cdata


def _never(packed: None) -> Tensor:
    raise AssertionError("the graph of a recomputation is not used")
