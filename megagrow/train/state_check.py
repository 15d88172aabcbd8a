"""Checks of a state: finite before it is saved or grown, and the same function after a growth."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagrow.config.schema import RunConfig
from megagrow.data.batches import BatchReader
from megagrow.errors import ConfigError
from megagrow.model.backends import uses_bf16
from megagrow.model.masks import Masks
from megagrow.parallel.agreement import any_across_ranks, run_on_all_ranks
from megagrow.parallel.collectives import gather
from megagrow.parallel.pipeline.passes import forward_head
from megagrow.train.stage import Stage, masks_now
from megagrow.train.step import mean_loss, model_inputs
from megagrow.train.train_state import RunState

POSITIONS = 256
"""Positions compared; full-vocabulary logits of each are kept on every rank."""
LEAST_TOKENS = 512
"""Minimum number of tokens of the fixed batch: on fewer tokens rounding errors hardly average out,
and the tolerance would have to be so large that it hides a wrong growth."""
ROUNDING = {True: 2.0**-5, False: 2.0**-16}
"""Standard deviation of the rounding error of a logit relative to the spread of the logits; key:
True for bf16 (8 units of roundoff), False for fp32 (256 units)."""


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
        loss = fixed_loss(run, stage, state.stage_tokens, fixed)
        if any_across_ranks(not math.isfinite(loss), stage.topology.device):
            return "the loss before the growth is not finite"
    return None


def fixed_loss(run: RunConfig, stage: Stage, stage_tokens: int, fixed: BatchReader) -> float:
    """Return the mean loss on the fixed batch, in nats. Collective.

    `stage_tokens` are the tokens of the stage so far, which determine the masks.
    """
    sequences = fixed_tokens(run, fixed) // fixed.length
    return mean_loss(stage, fixed, sequences, masks_now(run, stage, stage_tokens))


def fixed_tokens(run: RunConfig, fixed: BatchReader) -> int:
    """Return the number of tokens of the fixed batch: as many sequences for all growths of a run
    whose readers have sequences of one length."""
    length = fixed.length
    return length * max(run.stages[0].batch.global_batch_size, -(-LEAST_TOKENS // length))


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
    spread: float
    """Standard deviation over the vocabulary of the source's logits, root mean square over
    positions."""


def predictions(stage: Stage, reader: BatchReader, masks: Masks | None) -> Tensor:
    """Return the logits of the first sequences of a stream: (positions, vocab) fp32 on the CPU.

    The result is the same on all ranks. `masks` are this rank's. Collective.
    """
    topology = stage.topology
    sequences = list(range(-(-POSITIONS // reader.length)))
    batch = run_on_all_ranks(partial(reader.read, 0, sequences))
    vocab_size = stage.config.model.vocab_size
    logits = torch.empty((POSITIONS, vocab_size), device=topology.device)

    def last_logits(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        local = F.linear(hidden_BSD, weight_VD).flatten(0, 1)[-POSITIONS:].float()
        return gather(local, topology.tp_group).transpose(0, 1).flatten(1)[:, :vocab_size]

    with stage.evaluating():
        inputs = model_inputs(batch, stage.ops, topology.device)
        forward_head(stage.engine, (*inputs, masks), last_logits, logits)
    return logits.cpu()


def change(before: Tensor, after: Tensor) -> Change:
    """Return the difference of two predictions, excluding tokens unknown to the source."""
    after = after[:, : before.shape[1]]
    source, grown = (x.double().log_softmax(1) for x in (before, after))
    kl = (source.exp() * (source - grown)).sum(1).mean()
    spread = before.double().var(1, correction=0).mean().sqrt()
    return Change(float(kl), float((before - after).abs().max()), float(spread))


class Tolerance(NamedTuple):
    """Largest changes, in nats, that rounding explains at a growth that preserves the function."""

    loss: float
    kl: float


def rounding_tolerance(spread: float, loss: float, tokens: int, bf16: bool) -> Tolerance:
    """Return the tolerance of a precision; derivation in docs/reference/operators.md.

    Args:
        spread: `Change.spread`.
        loss: loss before the growth.
        tokens: number of tokens that it is the mean of.
        bf16: True for bf16, False for fp32.
    """
    error = ROUNDING[bf16] * spread
    sum_error = 2.0**-20 * abs(loss)
    return Tolerance(4 * error / tokens**0.5 + error**2 / 2 + sum_error, error**2)


def check_preserved(
    run: RunConfig, stage: Stage, step: int, losses: Sequence[float], change: Change, tokens: int
) -> None:
    """Raise ConfigError if a transition that should preserve the function changed it. Collective.

    Args:
        run: the run.
        stage: the grown stage.
        step: step of the run.
        losses: losses on the fixed batch before and after the growth.
        change: change of the prediction.
        tokens: tokens of the fixed batch.
    """
    growth, (before, after) = stage.config.growth, losses
    bf16 = uses_bf16(run, stage.topology.device)
    allowed = rounding_tolerance(change.spread, before, tokens, bf16)
    basis = f"the rounding of {'bf16' if bf16 else 'fp32'} explains on {tokens} tokens"
    if growth is not None and growth.tolerance is not None:
        allowed = Tolerance(growth.tolerance, growth.tolerance)
        basis = f"growth.tolerance = {growth.tolerance} allows"
    preserved = abs(after - before) <= allowed.loss and change.kl <= allowed.kl
    if any_across_ranks(not preserved, stage.topology.device):
        event = "the transition" if growth is None else "the growth"
        by = "" if growth is None else f" by {' with '.join(growth.operator)}"
        raise ConfigError(
            f"{event} at step {step}{by} should preserve the "
            f"function, but the loss on a fixed batch changed from {before:.6f} to {after:.6f} (KL "
            f"{change.kl:.2e}), more than {basis} ({allowed.loss:.2e}, KL {allowed.kl:.2e}); no "
            "step was taken and the checkpoint before the growth is intact: set growth.tolerance "
            "if the precision explains the difference, otherwise report a bug"
        )
