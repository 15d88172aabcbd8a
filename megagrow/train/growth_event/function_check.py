"""Change of the model's function by a growth, measured on one sequence."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.data.batches import BatchReader
from megagrow.model.masks import Masks
from megagrow.train.stage import Stage
from megagrow.train.step import model_inputs

POSITIONS = 256
"""Positions compared; full-vocabulary logits of each are kept on every rank."""


class Change(NamedTuple):
    """Change of the prediction at a growth."""

    kl: float
    """Mean over positions of KL(source || grown), in nats."""
    logits: float
    """Largest absolute difference of a logit."""


def predictions(stage: Stage, reader: BatchReader, masks: Masks | None) -> Tensor:
    """Return the logits of the first sequence of a stream: (positions, vocab) fp32 on the CPU.

    The result is the same on all ranks. `masks` are this rank's. Collective.
    """
    batch, topology = reader.read(0, [0]), stage.topology
    stage.engine.train(False)
    with torch.no_grad():
        inputs = model_inputs(batch, stage.ops, topology.device)
        logits = stage.engine.forward(*inputs, masks)[0, -POSITIONS:].float()
    stage.engine.train()
    parts = [torch.empty_like(logits) for _ in range(topology.tp)]
    dist.all_gather(parts, logits.contiguous(), group=topology.tp_group)
    return torch.cat(parts, dim=1)[:, : stage.config.model.vocab_size].cpu()


def change(before: Tensor, after: Tensor) -> Change:
    """Return the difference of two predictions, excluding tokens unknown to the source."""
    after = after[:, : before.shape[1]]
    source, grown = (x.double().log_softmax(1) for x in (before, after))
    kl = (source.exp() * (source - grown)).sum(1).mean()
    return Change(float(kl), float((before - after).abs().max()))
