"""ZeRO 0: an engine whose weights, gradients and moments exist on all data-parallel ranks.

DeepSpeed copies all gradients to a flat tensor and back, also on one rank. This engine leaves them
where autograd writes them, and sums them in place during the last backward pass of a step.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrow.parallel.engine_config import EngineSettings, ParamGroup
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.update_scaling import StepGate, clip_in_update, squared_norm

COMMUNICATION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes of `parallel.communication_data_type`."""


class ReplicatedEngine:
    """Model and optimizer with the methods of DeepSpeed's engine that `ZeroEngine` calls."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[ParamGroup],
        settings: EngineSettings,
        topology: Topology,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self._groups = groups
        self._topology = topology
        self._limit = settings.optimizer.gradient_clipping
        batch = settings.batch
        self._passes = batch.global_batch_size // (batch.micro_batch_size * topology.batch_ranks)
        self._is_last = True
        self._late: set[int] = set()
        self._norm: Tensor | None = None
        self.gate = StepGate()
        dtype = COMMUNICATION_DTYPES[settings.parallel.communication_data_type]
        self._sum = GradientSum(topology.dp_group, dtype)
        # One rank has no sums, and needs no hooks.
        reduced = module.parameters() if topology.dp > 1 else ()
        self._hooks = [p.register_post_accumulate_grad_hook(self._accumulated) for p in reduced]

    def __call__(self, *inputs: Any) -> Tensor:
        """Return the result of the model."""
        return self.module(*inputs)

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation mode."""
        self.module.train(mode)

    def begin_step(self, passes: int) -> None:
        """Begin a step of `passes` micro-batches."""
        self._passes = passes

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Set whether the next backward pass is the last one of its parameters in the step."""
        self._is_last = is_boundary

    def expect_late(self, parameter: nn.Parameter) -> None:
        """Wait for `add_late` before a parameter's gradient is complete."""
        self._late.add(id(parameter))

    def add_late(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a gradient that arrives after all backward passes of a step."""
        total = gradient if parameter.grad is None else parameter.grad + gradient
        parameter.grad = total.to(parameter.dtype)
        if self._hooks:
            self._sum.start(parameter.grad)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch; reduce in the last one of a step."""
        (loss / self._passes).backward()

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights after the last micro-batch of a step."""
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
                if self._hooks:
                    self._sum.start(parameter.grad)
        self._sum.finish()
        self._norm = self._global_norm()
        skips = self.gate.skips(self._norm)
        clip_in_update(self.optimizer, self._norm, self._topology.dp, self._limit, skips)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def get_global_grad_norm(self) -> Tensor | None:
        """Return the norm of the averaged gradients of the last step before clipping."""
        return self._norm

    def destroy(self) -> None:
        """Remove the hooks of the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _accumulated(self, parameter: Any) -> None:
        if self._is_last and id(parameter) not in self._late:
            self._sum.start(parameter.grad)

    def _global_norm(self) -> Tensor:
        topology = self._topology
        parameters = [group["params"] for group in self.optimizer.param_groups]
        pairs = [[(parameter, parameter.grad) for parameter in group] for group in parameters]
        groups = zip(pairs, (group.scale.norm for group in self._groups), strict=True)
        total = squared_norm(groups, topology.tp_rank, topology.device)
        dist.all_reduce(total, group=topology.tp_group)
        if topology.pp_group is not None:
            dist.all_reduce(total, group=topology.pp_group)
        return total.sqrt() / topology.dp


class GradientSum:
    """Sum of gradients over the data-parallel ranks, in place, while the backward pass continues.

    All ranks run the same graph, so gradients start in the same order on all of them.
    """

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self._group = group
        self._dtype = dtype
        self._started: list[tuple[Tensor, Tensor, dist.Work]] = []

    def start(self, gradient: Tensor) -> None:
        """Start to sum a gradient in the dtype of communication."""
        sent = gradient.to(self._dtype)
        work = dist.all_reduce(sent, group=self._group, async_op=True)
        assert work is not None
        self._started.append((gradient, sent, work))

    def finish(self) -> None:
        """Wait for all sums; on a GPU only the current stream waits."""
        for gradient, sent, work in self._started:
            work.wait()
            if sent is not gradient:
                gradient.copy_(sent)
        self._started.clear()
