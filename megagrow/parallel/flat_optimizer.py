"""Optimizer of ZeRO 1 and 2: DeepSpeed's partitions, with own gradients and an own step.

DeepSpeed 0.19 reduces ZeRO 1 in bf16 after the backward pass, ZeRO 2 in the dtype of the weights,
and its step reads the device four times. This subclass keeps DeepSpeed's partitions and replaces
the rest: `FlatGradients` sums and reduces, and the step leaves the norm on the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.parallel.deepspeed_import import DeepSpeedZeroOptimizer
from megagrow.parallel.engine_config import GATHER_BYTES
from megagrow.parallel.flat_gradients import FlatGradients, ReductionSettings
from megagrow.parallel.update_scaling import StepGate, clip_in_update, squared_norm


class FlatOptimizer(DeepSpeedZeroOptimizer):  # type: ignore[misc]  # DeepSpeed has no types
    """ZeRO 1 or 2; constructed by DeepSpeed's engine (`engine_build.built_empty`).

    `norm_weights` are the weights of the groups' squared norms in the global norm. With
    `shared_weights` the forward weights of all ranks are the same memory (`materialize_flat`).
    """

    norm_weights: Sequence[float]
    shared_weights = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norm_weights = [1.0] * len(self.bit16_groups)
        self.gate = StepGate()
        self.temp_grad_buffer_for_gpu_offload = None  # of DeepSpeed's own gradient path
        self.gradients = FlatGradients(
            self.bit16_groups,
            self.partition_size,
            ReductionSettings(
                group=self.dp_process_group,
                dtype=self.communication_data_type,
                bucket=self.reduce_bucket_size,
                every_pass=self.partition_gradients,
            ),
            self.is_gradient_accumulation_boundary,
        )
        self._grad_acc_hooks = self.gradients.hooks  # removed by `destroy`

    def create_gradient_handling_hooks(self) -> None:
        """Register nothing: `FlatGradients` has the hooks."""

    def setup_buckets(self) -> None:
        """Allocate nothing: `FlatGradients` has the buckets."""

    def backward_epilogue(self, *_: Any, **__: Any) -> None:
        """Do nothing: the hooks have summed the gradients."""

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Finish the last backward pass of a step under ZeRO 1."""
        self.gradients.finish()

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Finish a backward pass under ZeRO 2."""
        self.gradients.finish()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update this rank's fp32 weights and gather the forward weights. Collective.

        The norm of the averaged gradient, a tensor, is `_global_grad_norm`.
        """
        self.gradients.finish_step()
        ranks = self.gradients.ranks
        norm = self._global_norm() / ranks
        masters = self.single_partition_of_fp32_groups
        for master, gradient in zip(masters, self.gradients.shares(), strict=True):
            if self.cpu_offload:
                master.grad.copy_(gradient)
            else:
                master.grad = gradient
        clip_in_update(self.optimizer, norm, ranks, self.clip_grad, self.gate.skips(norm))
        self.optimizer.step()
        self._global_grad_norm = norm
        self._update_forward_weights()  # the norm's all-reduce ended all reads of shared weights

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the fp32 weights to the forward weights of all ranks. Collective."""
        if self.shared_weights:
            dist.barrier(self.dp_process_group)  # another rank may still read them
        self._update_forward_weights()

    def _update_forward_weights(self) -> None:
        rank = self.dp_process_group.rank()
        for index, master in enumerate(self.single_partition_of_fp32_groups):
            # The flat tensor of a one-parameter group is the parameter itself, tracked by autograd.
            shares = [share.data for share in self.parallel_partitioned_bit16_groups[index]]
            if self.cpu_offload:
                staged = self.param_buffer_of_bit16_for_cpu_offload_groups[index]
                staged.copy_(master)
                shares[rank].copy_(staged, non_blocking=True)
            else:
                shares[rank].copy_(master)
            if not self.shared_weights:
                flat = self.bit16_groups_flat[index].data
                _gather(flat, shares, rank, self.dp_process_group)
        if self.shared_weights:
            dist.barrier(self.dp_process_group)

    def _global_norm(self) -> Tensor:
        """Return the L2 norm of the summed gradient, with the groups' weights. Collective."""
        groups = zip(self.gradients.parts(), self.norm_weights, strict=True)
        total = squared_norm(groups, self.model_parallel_rank, self.bit16_groups_flat[0].device)
        dist.all_reduce(total)  # all ranks: data x context x pipeline x tensor
        return total.sqrt()


def _gather(flat: Tensor, shares: list[Tensor], rank: int, group: dist.ProcessGroup) -> None:
    """All-gather the shares of a flat tensor in place."""
    if len(shares) == 1:
        return
    if flat.device.type != "cpu":
        dist.all_gather_into_tensor(flat, shares[rank], group=group)
        return
    piece = max(1, GATHER_BYTES // (len(shares) * flat.element_size()))
    for start in range(0, shares[rank].numel(), piece):
        pieces = [share[start : start + piece] for share in shares]
        dist.all_gather(pieces, pieces[rank], group=group)
