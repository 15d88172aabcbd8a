"""Convert a single-device model to one rank's tensor-parallel share.

Column-parallel, row-parallel and vocab-parallel (head) layers are ordinary Linear modules that hold
a slice. The collectives are the `pre_collective` and `post_collective` of each block, once per
block instead of once per matrix. Only the embedding needs a separate class, because rows of other
ranks must read as zero.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagrow.model.decoder import CausalLM
from megagrow.model.layers.modules import LayerModule, PartialSum, RMSNorm, SharedWeight
from megagrow.model.layers.table import EMBEDDING
from megagrow.model.masks import Masks
from megagrow.parallel import collectives
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import ParamSpec

Collective = Callable[[Tensor, ProcessGroup], Tensor]


class Region(nn.Module):
    """Collective between replicated (or sequence-split) and tensor-parallel activations."""

    def __init__(self, collective: Collective, group: ProcessGroup) -> None:
        super().__init__()
        self.collective = collective
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        return self.collective(x, self.group)

    def extra_repr(self) -> str:
        return self.collective.__name__


class VocabParallelEmbedding(nn.Module):
    """Local rows of the embedding; tokens of other ranks give zero vectors."""

    def __init__(self, weight: nn.Parameter, first: int) -> None:
        super().__init__()
        self.weight = weight
        self.first = first

    def forward(self, input_ids: Tensor) -> Tensor:
        index = input_ids - self.first
        mine = (index >= 0) & (index < self.weight.shape[0])
        return F.embedding(index.masked_fill(~mine, 0), self.weight) * mine[..., None]


def parallelize(
    model: CausalLM, plan: dict[str, ParamSpec], topology: Topology, sequence_parallel: bool
) -> None:
    """Slice every parameter of a model on the meta device and insert the collectives."""
    _slice_parameters(model, plan, topology)
    if topology.tp == 1:
        return
    pre, post = collectives.copy_to_tensor_parallel, collectives.reduce_from_tensor_parallel
    if sequence_parallel:
        pre, post = collectives.gather_from_sequence, collectives.scatter_to_sequence
    for block in list(model.modules()):
        if isinstance(block, LayerModule):
            _replace_placeholders(block, topology.tp_group)
            block.pre_collective = Region(pre, topology.tp_group)
            block.post_collective = Region(post, topology.tp_group)
    if any(chunk.is_first for chunk in model.chunks):
        spec = plan[EMBEDDING.name]
        weight = cast(nn.Parameter, model.model.embed_tokens.weight)
        model.model.embed_tokens = VocabParallelEmbedding(
            weight, spec.slice_origin(topology.tp, topology.tp_rank)[0]
        )
    model.model.post_collective = Region(post, topology.tp_group)
    model.pre_collective = Region(pre, topology.tp_group)
    if sequence_parallel:
        # Norms process only the local part of the sequence: their gradients are partial sums.
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.weight_collective = Region(
                    collectives.copy_to_tensor_parallel, topology.tp_group
                )


def _replace_placeholders(block: LayerModule, group: ProcessGroup) -> None:
    """Replace the placeholders within a block by their collectives."""
    for owner in block.modules():
        for name, child in list(owner.named_children()):
            if isinstance(child, PartialSum):
                setattr(owner, name, Region(collectives.sum_of_partial, group))
            elif isinstance(child, SharedWeight):
                setattr(owner, name, Region(collectives.copy_to_tensor_parallel, group))


def _slice_parameters(model: CausalLM, plan: dict[str, ParamSpec], topology: Topology) -> None:
    sliced: dict[int, nn.Parameter] = {}  # by the unsliced parameter, so a tied head stays tied
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        if id(parameter) not in sliced:
            # A tied head is no parameter of the plan; the last pipeline rank has a copy of it.
            spec = plan.get(name) or plan[EMBEDDING.name]
            shape = spec.slice_shape(topology.tp)
            fresh: Any = nn.Parameter(parameter.new_empty(shape[:1] if spec.is_vector else shape))
            # DeepSpeed's gradient norm reads both marks: unmarked parameters are replicated on all
            # tensor-parallel ranks and must be counted once.
            fresh.model_parallel = fresh.tensor_model_parallel = spec.tp_dim is not None
            sliced[id(parameter)] = fresh
        setattr(model.get_submodule(owner), leaf, sliced[id(parameter)])


def rank_masks(masks: Masks, topology: Topology) -> Masks:
    """Return this rank's masks on its device: ffn (F/tp,), groups (G/tp,), inner (C/tp,), residual
    (D,).

    They are sliced evenly by rank, like the activation axes in `parallel/sharding.py`.
    """

    def mine(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.chunk(topology.tp)[topology.tp_rank]

    masks = replace(masks, groups=mine(masks.groups), ffn=mine(masks.ffn), inner=mine(masks.inner))
    return masks.to(topology.device)
