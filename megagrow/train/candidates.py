"""Which operator grows a stage: the one that the run file names, or the best of several candidates.

The loss after a few steps tells more of how a grown model will train than the loss at the growth
("landscape-aware growing", Karp et al. 2024, arXiv 2406.02469). So each candidate is grown in turn
out of the same state and trained on the same tokens, and the best is then grown once more, to be
trained from there like any other. What the candidates cost is charged to the run.
"""

import math
from collections.abc import Callable

from megagrow.config.schema import RunConfig
from megagrow.errors import InputError
from megagrow.growth.problems import candidates
from megagrow.train.feed import Feed, Spent, spent_on_steps
from megagrow.train.grow import Ended, GrowthReport, grow
from megagrow.train.loop import train_at
from megagrow.train.stage import Stage
from megagrow.train.state import RunState


def grow_best(
    run: RunConfig,
    ended: Ended,
    feed: Feed,
    loss_of: Callable[[RunConfig, Stage, int], float],
    say: Callable[[str], None],
) -> tuple[RunConfig, Stage, GrowthReport, Spent]:
    """Grows the next stage; all ranks together. Returns also the run with the operator chosen, and
    what was spent on choosing.

    `loss_of` judges a candidate of which so many steps have been trained.
    """
    index = ended.index + 1
    growth, spent = run.stages[index].growth, Spent()
    if growth is not None and growth.probe is not None:
        losses: dict[str, float] = {}
        for name in growth.probe.operators:
            candidate = with_operators(run, index, (name,))
            losses[name] = _tried(candidate, ended, feed, growth.probe.steps, loss_of)
            say(f"probe: {name} has a loss of {losses[name]:.4f} after {growth.probe.steps} steps")
            spent = spent.plus(spent_on_steps(run.stages[index], feed.length, growth.probe.steps))
        best = min(losses, key=lambda name: losses[name])
        if not math.isfinite(losses[best]):
            raise InputError(f"stages.{index}.growth.probe: no candidate has a finite loss")
        run = with_operators(run, index, (best,))
    return run, *grow(run, ended, feed), spent


def _tried(
    run: RunConfig,
    ended: Ended,
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


def with_operators(run: RunConfig, index: int, names: tuple[str, ...]) -> RunConfig:
    """The run with these operators in the place of what stage `index` says of them."""
    stage = run.stages[index]
    assert stage.growth is not None
    growth = stage.growth.model_copy(update={"operator": list(names), "probe": None})
    stages = list(run.stages)
    stages[index] = stage.model_copy(update={"growth": growth})
    return run.model_copy(update={"stages": stages})


def as_grown(run: RunConfig, state: RunState) -> RunConfig:
    """The run with the operators by which it has grown so far. InputError if the run file names
    others: masks and hyper-parameters of the stage would silently be those of another growth."""
    for index, names in enumerate(state.operators, start=1):
        growth = run.stages[index].growth
        if not names or growth is None:
            continue
        allowed = ["+".join(chosen.operator) for chosen in candidates(growth)]
        if "+".join(names) not in allowed:
            raise InputError(
                f"stages.{index}.growth names {' or '.join(allowed)}, but the run has grown by "
                f"{'+'.join(names)}: set it back, or start in another output_dir"
            )
        run = with_operators(run, index, names)
    return run
