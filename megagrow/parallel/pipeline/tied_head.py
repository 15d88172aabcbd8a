"""Tied embedding and head on different pipeline ranks.

The weight and its optimizer state belong to the first rank. The last rank has a copy of the weight:
it sends the gradient of its copy to the first rank before each update, and receives the updated
weight. So the state has one owner, as every other parameter, and the copies cannot diverge.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrow.model.decoder import CausalLM
from megagrow.model.layers.table import EMBEDDING
from megagrow.parallel.pipeline.execution import TransferBatch
from megagrow.parallel.process_groups import Topology

AddGradient = Callable[[nn.Parameter, Tensor], None]


class TiedHead:
    """Exchange of the weight and the gradient of a tied head with the first pipeline rank."""

    def __init__(self, model: CausalLM, topology: Topology) -> None:
        assert topology.pp_group is not None
        self._group, self._last = topology.pp_group, topology.pp - 1
        self.embedding = self._copy = self._gradient = None
        if topology.pp_rank == 0:
            self.embedding = model.get_parameter(EMBEDDING.name)
        elif topology.pp_rank == self._last:
            self._copy = _own_copy(model, topology.device)
            self._gradient = torch.zeros_like(self._copy, dtype=torch.float32)
            self._copy.register_post_accumulate_grad_hook(self._accumulate)

    def send_gradient(self, add: AddGradient) -> None:
        """Send the gradient of the copy to `add` on the first rank. Collective over both."""
        if self.embedding is not None:
            gradient = torch.empty_like(self.embedding, dtype=torch.float32)
            self._transfer(dist.irecv, gradient, self._last)
            add(self.embedding, gradient)
        elif self._gradient is not None:
            self._transfer(dist.isend, self._gradient, 0)
            self._gradient.zero_()

    @torch.no_grad()
    def send_weight(self) -> None:
        """Send the weight of the first rank to the copy. Collective over both."""
        if self.embedding is not None:
            self._transfer(dist.isend, self.embedding.detach(), self._last)
        elif self._copy is not None:
            self._transfer(dist.irecv, self._copy.detach(), 0)

    def _transfer(self, kind: Any, tensor: Tensor, peer: int) -> None:
        """Send or receive a tensor. Batches use the communicator of the group; alone, NCCL would
        create one for the two ranks."""
        TransferBatch([dist.P2POp(kind, tensor, group=self._group, group_peer=peer)]).wait()

    def _accumulate(self, copy: Tensor) -> None:
        assert self._gradient is not None and copy.grad is not None
        self._gradient += copy.grad
        copy.grad = None


def _own_copy(model: CausalLM, device: torch.device) -> Tensor:
    """Replace the parameter of the head by a tensor that no optimizer updates, and return it."""
    unbound = model.lm_head.weight
    copy = torch.zeros(unbound.shape, dtype=unbound.dtype, device=device, requires_grad=True)
    del model.lm_head.weight
    model.lm_head.register_buffer("weight", copy, persistent=False)
    return copy
