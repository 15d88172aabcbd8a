"""Passes of an engine through all chunks of its model."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megagrow.model.decoder import HeadLoss
from megagrow.model.decoding import DecodingCache
from megagrow.model.masks import Masks
from megagrow.parallel.engine import ZeroEngine
from megagrow.parallel.pipeline.execution import PipelineRun
from megagrow.parallel.pipeline.schedule import Pass, timeline


def pipeline_run(engine: ZeroEngine, ids: Tensor, micro_batches: int, trains: bool) -> PipelineRun:
    """Return the schedule of an engine for some micro-batches.

    Args:
        engine: the engine.
        ids: token ids (B, S) of a micro-batch; all have this shape.
        micro_batches: number of micro-batches of this rank.
        trains: True with backward passes.
    """
    split, topology, settings = engine.split, engine.topology, engine.settings
    line = timeline(split.ranks, split.chunks_per_rank, micro_batches, trains)
    sequences, length = ids.shape
    local = length // (topology.tp if settings.parallel.sequence_parallel else 1)
    shape = (sequences, local, settings.model.hidden_size)
    return PipelineRun(line, topology, shape, engine.hidden_dtype)


def forward_head(
    engine: ZeroEngine,
    inputs: tuple[Tensor, Tensor, Any, Masks | None],
    head: HeadLoss,
    result: Tensor,
    cache: DecodingCache | None = None,
) -> None:
    """Run one forward pass and write the value of `head` to `result` on all pipeline ranks.

    Collective over the pipeline- and tensor-parallel ranks. `head` is called on the last pipeline
    rank only.

    Args:
        engine: the engine in evaluation mode.
        inputs: token ids and positions (B, S) int64, packed documents and masks, as for
            `CausalLM.forward`.
        head: function of the final hidden states and the head's weight.
        result: tensor with the shape and the dtype of its value.
        cache: decoding states; each rank uses those of its layers.
    """
    ids, *others = inputs
    topology, last = engine.topology, engine.split.last_chunk

    def forward(each: Pass, hidden: Tensor | None) -> Tensor:
        chunk = engine.chunks[each.chunk]
        output = engine.forward(ids if hidden is None else hidden, *others, head, cache, chunk)
        if each.chunk == last:
            result.copy_(output)
        return output

    pipeline_run(engine, ids, micro_batches=1, trains=False).execute(forward)
    if topology.pp_group is not None:
        dist.broadcast(result, group=topology.pp_group, group_src=topology.pp - 1)
