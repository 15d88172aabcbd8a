"""Masks as one rank needs them: of the axes that tensor parallelism slices, its own part."""

from dataclasses import replace

from torch import Tensor

from megagrow.model.masks import Masks
from megagrow.parallel.process_groups import Topology


def rank_masks(masks: Masks, topology: Topology) -> Masks:
    """This rank's masks, on its device: ffn (F/tp,) and groups (G/tp,), the residual one whole.

    They are sliced as `parallel/plan.py` slices the rows of gate_proj and of k_proj: evenly, rank
    by rank.
    """

    def mine(mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask.chunk(topology.tp)[topology.tp_rank]

    masks = replace(masks, groups=mine(masks.groups), ffn=mine(masks.ffn))
    return masks.to(topology.device)
