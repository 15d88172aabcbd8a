"""The learning rate as a pure function of tokens.

Convention: the value at `tokens` is used by the step that begins there. Warm-up is evaluated at the
end of that step: the first of W warm-up steps trains at lr / W (never at 0), the last one at lr.
Decay is evaluated at the start of the step: it begins at lr and reaches min_lr at the horizon. All
steps that begin there or later use min_lr.

At a growth `rewarm` restarts the schedule; `continue` and `by_size` continue it, as if all stages
were one. A stage without growth continues it unless it sets `restart`. All count the tokens trained
in stages, without those read by growths.
"""

import math

from megagrow.config.growth import GrowthConfig, NewEntriesConfig
from megagrow.config.growth_guidelines import rate_for_size
from megagrow.config.schema import OptimizerConfig, RunConfig, ScheduleConfig, StageConfig
from megagrow.config.stage import RATE_KEYS
from megagrow.config.stage_length import step_tokens, tokens_between, tokens_of_steps
from megagrow.growth.mask_schedule import ramp_tokens
from megagrow.growth.operators import operators_of
from megagrow.model.layers.flops import parameters

WSD_DECAY = 0.1
"""Default fraction of the horizon for WSD's decay (MiniCPM, arXiv 2404.06395, section 4)."""


def learning_rate(
    schedule: ScheduleConfig,
    optimizer: OptimizerConfig,
    tokens: int,
    tokens_per_step: int,
    horizon: int,
    warmup: int | None = None,
) -> float:
    """Return the learning rate of the step that starts at `tokens` from the schedule's origin.

    `horizon` is the number of tokens, from the same origin, at which the schedule ends unless it
    specifies its own end. `warmup` is the length of the warm-up in tokens, by default that of
    `warmup_steps` steps of this size. Where warm-up and decay overlap, the smaller rate applies.
    """
    if warmup is None:
        warmup = (schedule.warmup_steps or 0) * tokens_per_step or schedule.warmup_tokens or 0
    end = schedule.horizon_tokens or horizon
    rising = min(1.0, (tokens + tokens_per_step) / warmup) if warmup else 1.0
    left = 1.0 - _decayed(schedule, tokens, warmup, end)
    falling = optimizer.min_lr + left * (optimizer.lr - optimizer.min_lr)
    return min(rising * optimizer.lr, falling)


def warmup_length(schedule: ScheduleConfig, origin: StageConfig) -> int:
    """Return the tokens of warm-up of a schedule that starts with stage `origin`; 0 without."""
    if schedule.warmup_steps is not None:
        return tokens_of_steps(origin, schedule.warmup_steps)
    return schedule.warmup_tokens or 0


def _decayed(schedule: ScheduleConfig, tokens: int, warmup: int, end: int) -> float:
    """Return the progress from lr to min_lr: 0 before the decay, 1 after it."""
    if schedule.type == "constant":
        return 0.0
    start = warmup
    if schedule.type == "wsd":
        start = max(warmup, end - (schedule.decay_tokens or math.ceil(WSD_DECAY * end)))
    if tokens >= end:
        return 1.0
    if tokens <= start:
        return 0.0
    way = (tokens - start) / (end - start)
    return (1.0 - math.cos(math.pi * way)) / 2 if schedule.type == "cosine" else way


def origin_stage(run: RunConfig, stage_index: int) -> int:
    """Return the stage at whose start the schedule of stage `stage_index` has its origin.

    This is the stage itself if its growth sets `lr_schedule: rewarm` or if it has no growth and
    sets `restart`, else the origin of the previous stage.
    """
    stage = run.stages[stage_index]
    growth = stage.growth
    restarts = stage.schedule.restart if growth is None else growth.lr_schedule == "rewarm"
    return stage_index if stage_index == 0 or restarts else origin_stage(run, stage_index - 1)


def stage_optimizer(run: RunConfig, stage_index: int) -> OptimizerConfig:
    """Return the optimizer settings of a stage with the effective learning rates.

    With `lr_schedule: by_size` all rates are those of the previous stage, times the ratio of the
    rates at which the paper trained models of the two sizes. The stage's own rates are then unused;
    `config/validation.py` refuses values other than those of the previous stage. A stage without
    growth that continues the schedule with the previous stage's rates has its scaled rates too.
    """
    stage = run.stages[stage_index]
    if stage_index == 0 or origin_stage(run, stage_index) == stage_index:
        return stage.optimizer
    if stage.growth is None and _same_rates(run, stage_index):
        return stage.optimizer.model_copy(update=_rates_before(run, stage_index))
    if stage.growth is None or stage.growth.lr_schedule != "by_size":
        return stage.optimizer
    new, old = (
        rate_for_size(parameters(run.stages[i].model)) for i in (stage_index, stage_index - 1)
    )
    before = _rates_before(run, stage_index)
    rates = {key: rate and rate * new / old for key, rate in before.items()}
    return stage.optimizer.model_copy(update=rates)


def _rates_before(run: RunConfig, stage_index: int) -> dict[str, float | None]:
    before = stage_optimizer(run, stage_index - 1)
    return {key: getattr(before, key) for key in RATE_KEYS}


def _same_rates(run: RunConfig, stage_index: int) -> bool:
    """Return True if the run file has the same rates for a stage and the previous one."""
    rates = [tuple(getattr(each.optimizer, key) for key in RATE_KEYS) for each in run.stages]
    return rates[stage_index - 1] == rates[stage_index]


def other_rates_at(run: RunConfig, stage_index: int, stage_tokens: int) -> dict[str, float]:
    """Return the learning rates of parameters whose rate differs from `rate_at`.

    They follow the same schedule with their own peak and final rate, by the keys of
    `OptimizerConfig.other_rates`.
    """
    optimizer = stage_optimizer(run, stage_index)
    return {
        name: rate_at(run, stage_index, stage_tokens, peak_and_final)
        for name, peak_and_final in optimizer.other_rates.items()
    }


def rate_at(
    run: RunConfig,
    stage_index: int,
    stage_tokens: int,
    peak_and_final: tuple[float, float] | None = None,
) -> float:
    """Return the learning rate of the step that begins `stage_tokens` into stage `stage_index`.

    Uses the stage's own schedule, warm-up included, counted from the schedule's origin (see
    `origin_stage`), with the rates of `stage_optimizer`. The default horizon is the end of the
    run. A stage that continues with the settings of the previous stage therefore behaves as if both
    were one stage. `warmup_steps` are steps of the stage at the origin: a larger batch after the
    growth does not extend a completed warm-up. `peak_and_final` replaces `lr` and `min_lr`.
    """
    optimizer = stage_optimizer(run, stage_index)
    peak, final = peak_and_final or (optimizer.lr, optimizer.min_lr)
    stage = run.stages[stage_index]
    origin = origin_stage(run, stage_index)
    return learning_rate(
        stage.schedule,
        optimizer.model_copy(update={"lr": peak, "min_lr": final}),
        tokens_between(run, origin, stage_index) + stage_tokens,
        step_tokens(stage, stage_tokens),
        tokens_between(run, origin, len(run.stages)),
        warmup=warmup_length(stage.schedule, run.stages[origin]),
    )


def new_entries_of(growth: GrowthConfig) -> NewEntriesConfig | None:
    """Return the schedule of new entries, from the run file or the operator, or None."""
    by_operator = any(operator.rewarms for operator in operators_of(growth))
    return growth.new_entries or (NewEntriesConfig() if by_operator else None)


def derived_lengths(run: RunConfig, stage: int) -> dict[str, int]:
    """Return the lengths of a stage that other keys determine, in tokens, by their keys."""
    config = run.stages[stage]
    origin = run.stages[origin_stage(run, stage)]
    new = None if config.growth is None else new_entries_of(config.growth)
    return {
        "schedule.warmup_tokens": warmup_length(config.schedule, origin),
        "growth.new_entries": tokens_of_steps(config, new.warmup_steps) if new else 0,
        "growth.ramp_tokens": ramp_tokens(run, stage),
    }


def last_growth(run: RunConfig, stage_index: int) -> int | None:
    """Return the stage whose growth added the newest entries of stage `stage_index`.

    None if there is none, or if a stage without growth has restarted the schedule since.
    """
    stage = run.stages[stage_index]
    if stage_index == 0 or stage.growth is not None:
        return None if stage.growth is None else stage_index
    restarts = origin_stage(run, stage_index) == stage_index
    return None if restarts else last_growth(run, stage_index - 1)


def new_entries_rate(run: RunConfig, stage_index: int, stage_tokens: int) -> float:
    """Return the rate of new entries in the step `stage_tokens` tokens into a stage.

    The rate rises linearly from the rate at the growth to `peak_factor` times that rate in
    `warmup_steps`. It then follows a cosine to min_lr at the end of the schedule (SPARKLING, arXiv
    2602.02472, section 4.2). Warm-up and decay are evaluated as in `learning_rate`.
    """
    stage, grown = run.stages[stage_index], last_growth(run, stage_index)
    growth = None if grown is None else run.stages[grown].growth
    new = None if growth is None else new_entries_of(growth)
    if new is None or grown is None:
        raise AssertionError(f"stage {stage_index} has no separate learning rate for new entries")
    at_growth = rate_at(run, grown, 0)
    done = tokens_between(run, grown, stage_index) + stage_tokens
    per_step = step_tokens(stage, stage_tokens)
    warmup = tokens_of_steps(run.stages[grown], new.warmup_steps)
    origin = origin_stage(run, stage_index)
    horizon = stage.schedule.horizon_tokens or tokens_between(run, origin, len(run.stages))
    end = horizon - tokens_between(run, origin, grown)
    if done < min(warmup, end):
        return at_growth * (1 + (new.peak_factor - 1) * min(1.0, (done + per_step) / warmup))
    left = 1.0 - _decayed(ScheduleConfig(type="cosine"), done, warmup, end)
    low = stage_optimizer(run, stage_index).min_lr
    return low + left * (new.peak_factor * at_growth - low)
