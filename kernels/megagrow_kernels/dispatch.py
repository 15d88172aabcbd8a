"""Calls of differentiable kernels: an autograd function in eager mode, a custom op when traced.

`torch.library.custom_op` makes a kernel opaque to torch.compile, to fake tensors and to dispatch
modes such as selective activation checkpointing, but costs several times the host time of an
autograd function. `is_traced` decides, for all kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(x: Tensor) -> bool:
    """Return True if a call with this tensor must be a registered op.

    This is so while torch.compile traces, under a dispatch mode, and for fake, meta and other
    special tensors, whose kernels do not run.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
    )


def differentiable(
    op: CustomOpDef,
    backward_op: CustomOpDef,
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """Register the gradient of an op; return the function that calls it.

    Args:
        op: the op. Its results that are not differentiable are marked by `save`.
        backward_op: the op that computes its gradients.
        functions: the same two without registration, for eager mode.
        save: (ctx, inputs, output) -> None, saves tensors for the backward pass.
        gradients: (backward, ctx, *output gradients) -> input gradients; `backward` is
            `backward_op` or its function.
    """
    forward, backward = functions

    def traced_gradients(ctx: Any, *upstream: Tensor | None) -> Any:
        return gradients(backward_op, ctx, *upstream)

    class Eager(torch.autograd.Function):
        """The kernels without registration."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor | None) -> Any:
            # With create_graph=True: the op refuses to be differentiated a second time.
            chosen = backward_op if torch.is_grad_enabled() else backward
            return gradients(chosen, ctx, *upstream)

    op.register_autograd(traced_gradients, setup_context=save)

    def call(*inputs: Any) -> Any:
        return op(*inputs) if is_traced(inputs[0]) else Eager.apply(*inputs)

    return call


def without_gradient(
    op: CustomOpDef, function: Callable[..., Any], mutates_first: bool = False
) -> Callable[..., Any]:
    """Return the function that calls an op which is not differentiable.

    With `mutates_first`, the op overwrites its first argument, and autograd must notice.
    """

    def call(*inputs: Any) -> Any:
        x = inputs[0]
        if is_traced(x) or (x.requires_grad and torch.is_grad_enabled()):
            return op(*inputs)
        if mutates_first:
            torch.autograd.graph.increment_version(x)
        return function(*inputs)

    return call
