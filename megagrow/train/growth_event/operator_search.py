"""Operator of a growth: the one in the run file, or the best of several candidates.

The loss after a few steps predicts the training of a grown model better than the loss at the growth
("landscape-aware growing", Karp et al. 2024, arXiv 2406.02469). Each candidate is grown from the
same state and trained on the same tokens; the best one is then grown again and trained as usual.
The run's counters include the cost of the candidates.
"""

import logging
import math
from collections.abc import Callable

from megagrow.common.progress import PhaseProgress
from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import step_tokens
from megagrow.errors import ConfigError
from megagrow.train.growth_event.cost import Feed, GrowthCost, spent_on_steps
from megagrow.train.growth_event.event import FinishedStage, GrowthReport, grow
from megagrow.train.growth_event.run_growths import with_operators
from megagrow.train.loop import train_at
from megagrow.train.stage import Stage

logger = logging.getLogger(__name__)


def grow_best(
    run: RunConfig,
    ended: FinishedStage,
    feed: Feed,
    loss_of: Callable[[RunConfig, Stage, int], float],
) -> tuple[RunConfig, Stage, GrowthReport, GrowthCost]:
    """Grow the next stage with the best operator. Collective.

    Args:
        run: the run.
        ended: the finished stage.
        feed: the training stream.
        loss_of: loss of a candidate after a number of tokens of its stage.

    Returns:
        The run with the chosen operator, the new stage, its report and the cost of the search.
    """
    index = ended.index + 1
    growth, spent = run.stages[index].growth, GrowthCost()
    if growth is not None and growth.probe is not None:
        losses: dict[str, float] = {}
        steps = growth.probe.steps
        for name in growth.probe.operators:
            candidate = with_operators(run, index, (name,))
            losses[name] = _tried(name, candidate, ended, feed, steps, loss_of)
            logger.info("probe %s | loss %.4f after %d steps", name, losses[name], steps)
            spent = spent.plus(spent_on_steps(run.stages[index], steps))
        best = min(losses, key=lambda name: losses[name])
        if not math.isfinite(losses[best]):
            raise ConfigError(f"stages.{index}.growth.probe: no candidate has a finite loss")
        run = with_operators(run, index, (best,))
    return run, *grow(run, ended, feed), spent


def _tried(
    name: str,
    run: RunConfig,
    ended: FinishedStage,
    feed: Feed,
    steps: int,
    loss_of: Callable[[RunConfig, Stage, int], float],
) -> float:
    """Return the loss of a candidate after some steps, and release it."""
    stage, _ = grow(run, ended, feed)
    per_step = step_tokens(stage.config)
    progress = PhaseProgress(f"probe {name}", steps, "steps")
    for step in range(steps):
        batches = feed.batches(step, stage.config, stage.topology, stage.ops)
        train_at(run, stage, step * per_step, batches)
        progress.advance()
    loss = loss_of(run, stage, steps * per_step)
    stage.release()
    return loss if math.isfinite(loss) else math.inf
