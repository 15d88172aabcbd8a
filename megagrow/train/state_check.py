"""Checks of a state: finite before it is saved or grown, and the same function after a growth."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.config.growth import GrowthConfig
from megagrow.config.schema import RunConfig
from megagrow.data.batches import BatchReader
from megagrow.errors import ConfigError
from megagrow.model.masks import Masks
from megagrow.parallel.agreement import any_across_ranks
from megagrow.train.stage import Stage, masks_now
from megagrow.train.step import mean_loss, model_inputs
from megagrow.train.train_state import RunState

POSITIONS = 256
"""Positions compared; full-vocabulary logits of each are kept on every rank."""


def unfit_reason(run: RunConfig, stage: Stage, state: RunState, fixed: BatchReader) -> str | None:
    """Return why a state must not be saved or grown, None if there is no reason. Collective.

    Weights and moments must be finite; their cost is one pass over this rank's shard. At the end of
    a stage that grows, the loss on the batch with which the growth is measured must be finite too:
    weights may be finite but too large.
    """
    name = non_finite(stage)
    if name is not None:
        return f"{name} is not finite"
    if state.stage_tokens >= stage.config.tokens and stage.index + 1 < len(run.stages):
        sequences = stage.config.batch.global_batch_size
        loss = fixed_loss(run, stage, state.stage_tokens, fixed, sequences)
        if any_across_ranks(not math.isfinite(loss), stage.topology.device):
            return "the loss before the growth is not finite"
    return None


def fixed_loss(
    run: RunConfig, stage: Stage, stage_tokens: int, fixed: BatchReader, sequences: int
) -> float:
    """Return the mean loss on the first sequences of a stream, in nats. Collective.

    `stage_tokens` are the tokens of the stage so far, which determine the masks.
    """
    return mean_loss(stage, fixed, sequences, masks_now(run, stage, stage_tokens))


def non_finite(stage: Stage) -> str | None:
    """Return the name of a weight or moment that is not finite, None if all are. Collective.

    All ranks return the name that the first affected rank has found.
    """
    found = _non_finite_here(stage)
    if not any_across_ranks(found is not None, stage.topology.device):
        return None
    everywhere: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return next(name for name in everywhere if name is not None)


def _non_finite_here(stage: Stage) -> str | None:
    states = [
        (f"{kind} of {name}", tensor)
        for name, kinds in stage.engine.storage().items()
        for kind, tensor in kinds.items()
    ]
    if not states:
        return None
    # The extremes are NaN if any value is; they need no memory, and the device is read once.
    extremes = [torch.stack(torch.aminmax(tensor)) for _, tensor in states]
    finite = torch.stack(extremes).isfinite().all(dim=1).tolist()
    return next((name for (name, _), good in zip(states, finite, strict=True) if not good), None)


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


def check_preserved(
    growth: GrowthConfig, step: int, losses: Sequence[float], change: Change, device: torch.device
) -> None:
    """Raise ConfigError if an operator that should preserve the function changed it. Collective.

    Args:
        growth: the growth.
        step: step of the run.
        losses: losses on a fixed batch before and after the growth.
        change: change of the prediction.
        device: device of this rank.
    """
    before, after = losses
    moved = max(abs(after - before), change.kl)
    if any_across_ranks(not moved <= growth.tolerance, device):
        raise ConfigError(
            f"the growth at step {step} by {' with '.join(growth.operator)} should preserve the "
            f"function, but the loss on a fixed batch changed from {before:.6f} to {after:.6f} (KL "
            f"{change.kl:.2e}), more than growth.tolerance = {growth.tolerance}; no step was taken "
            "and the checkpoint before the growth is intact: raise the tolerance if the precision "
            "explains the difference, otherwise report a bug"
        )
