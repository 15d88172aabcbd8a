"""Which operator grows a stage: the one that the run file names, or the best of several candidates.

The loss after a few steps tells more of how a grown model will train than the loss at the growth
("landscape-aware growing", Karp et al. 2024, arXiv 2406.02469). So each candidate is grown in turn
out of the same state and trained on the same tokens, and the best is then grown once more, to be
trained from there like any other. What the candidates cost is charged to the run.
"""

import logging
import math
from collections.abc import Callable

from megagrow.config.schema import RunConfig
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
    """Grows the next stage; all ranks together. Returns also the run with the operator chosen, and
    what was spent on choosing.

    `loss_of` judges a candidate of which so many steps have been trained.
    """
    index = ended.index + 1
    growth, spent = run.stages[index].growth, GrowthCost()
    if growth is not None and growth.probe is not None:
        losses: dict[str, float] = {}
        for name in growth.probe.operators:
            candidate = with_operators(run, index, (name,))
            losses[name] = _tried(candidate, ended, feed, growth.probe.steps, loss_of)
            steps = growth.probe.steps
            logger.info("probe %s | loss %.4f after %d steps", name, losses[name], steps)
            spent = spent.plus(spent_on_steps(run.stages[index], feed.length, growth.probe.steps))
        best = min(losses, key=lambda name: losses[name])
        if not math.isfinite(losses[best]):
            raise ConfigError(f"stages.{index}.growth.probe: no candidate has a finite loss")
        run = with_operators(run, index, (best,))
    return run, *grow(run, ended, feed), spent


def _tried(
    run: RunConfig,
    ended: FinishedStage,
    feed: Feed,
    steps: int,
    loss_of: Callable[[RunConfig, Stage, int], float],
) -> float:
    """The loss of a candidate after some steps; nothing is left of it."""
    stage, _ = grow(run, ended, feed)
    for step in range(steps):
        train_at(run, stage, step, feed.batches(step, stage.config, stage.topology))
    loss = loss_of(run, stage, steps)
    stage.release()
    return loss if math.isfinite(loss) else math.inf
