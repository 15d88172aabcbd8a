"""Conclusion of a report, and its limits, in sentences."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import fmean

from megagrow.analysis.curves import SMOOTHING
from megagrow.analysis.equal_cost import COST_AXES, EqualCost, comparable, compared_kind
from megagrow.analysis.mixing import MixingTimes, mixing_times
from megagrow.analysis.seeds import Matchup, SeedGroup
from megagrow.analysis.speedup_curve import LossKind, loss_series
from megagrow.common.sizes import format_duration, format_short


def conclude(
    groups: Sequence[SeedGroup], matchups: Sequence[Matchup], equal: Sequence[EqualCost]
) -> list[str]:
    """Return the final losses, the better setting at equal cost, and the mixing times and speedups
    of growth."""
    mixing = filter(None, map(mixing_times, matchups))
    speedups = map(_speedup, filter(_defined, matchups))
    return [_final_losses(groups), *_better(equal), *map(_mixing, mixing), *speedups]


def missing(groups: Sequence[SeedGroup], matchups: Sequence[Matchup]) -> list[str]:
    """Return the limits of the comparison, one sentence each: unknown results and unequal runs."""
    runs = [run for group in groups for run in group.runs]
    lines = [
        f"{run.name} is not finished: step {run.step:,} of {run.planned_steps:,}."
        for run in runs
        if not run.finished
    ]
    lines += [
        f"{run.name} has fewer than two validation losses; training losses, averaged over the last "
        f"{SMOOTHING:.0%} of the tokens, are compared."
        for run in runs
        if len(run.validation.loss) < 2
    ]
    lines += [
        f"{group.name} does not contain the training cost of its initial model and is not compared."
        for group in groups
        if group not in comparable(groups)
    ]
    return [*lines, *_missing_speedups(groups, matchups), *_unfair(groups)]


def _final_losses(groups: Sequence[SeedGroup]) -> str:
    kind = compared_kind(groups)
    losses = {group.name: _final(group, kind) for group in groups}
    if len(groups) == 1:
        run, (name, loss) = groups[0].runs[0], *losses.items()
        done = "Final" if run.finished else "Latest"
        return (
            f"{done} {kind} loss of {name}: {loss:.4f} after {format_short(run.tokens)} tokens, "
            f"{run.flops:.3g} FLOPs and {format_duration(run.seconds)} of training."
        )
    if len(groups) == 2:
        each = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        return f"Final {kind} loss: {each}."
    (best, low), (second, next_low), *_ = sorted(losses.items(), key=lambda item: item[1])
    return (
        f"{best} has the lowest final {kind} loss of {len(groups)} settings, {low:.4f}; "
        f"{second} follows with {next_low:.4f}."
    )


def _final(group: SeedGroup, kind: LossKind) -> float:
    return fmean(loss_series(run, kind).loss[-1] for run in group.runs)


def _better(equal: Sequence[EqualCost]) -> Iterator[str]:
    """Yield a sentence for each setting that has the lowest loss on some axes."""
    ranked = sorted(equal, key=lambda one: (one.best.name, [*COST_AXES].index(one.axis)))
    for best, axes in groupby(ranked, key=lambda one: one.best.name):
        won = list(axes)
        margins = [
            f"{COST_AXES[one.axis]} (by {one.second.mean - one.best.mean:.4f}"
            f"{f' to {one.second.name}' if len(one.groups) > 2 else ''}"
            f"{', within the range over seeds' if one.overlaps else ''})"
            for one in won
        ]
        word = "lowest" if len(won[0].groups) > 2 else "lower"
        yield f"{best} has the {word} loss at equal {_join(margins)}."


def _defined(matchup: Matchup) -> bool:
    return bool(matchup.levels["flops"])


def _speedup(matchup: Matchup) -> str:
    level = matchup.levels["flops"][-1]
    saved = f"{abs(level.saved):.1%} {'fewer' if level.saved >= 0 else 'more'} FLOPs"
    return (
        f"At equal loss {level.loss:.4f}, {matchup.grown.name} needed {saved} than "
        f"{matchup.scratch.name}, base included: speedup sp = {level.mean:+.1%}."
    )


def _mixing(mixing: MixingTimes) -> str:
    grown, fixed = mixing.matchup.grown.name, mixing.matchup.scratch.name
    if mixing.tokens is not None:
        return (
            f"{grown} meets the loss of {fixed} at equal tokens {format_short(mixing.tokens)} "
            "tokens after its last growth (mixing time)."
        )
    met = f" in {len(mixing.pairs) - len(mixing.met)} of {len(mixing.pairs)} pairs"
    return (
        f"{grown} does not meet the loss of {fixed} at equal tokens within the "
        f"{format_short(mixing.shared_tokens)} tokens after its last growth that both runs have"
        f"{met if mixing.met else ''}: it ends {mixing.gap:+.4f} from it."
    )


def _missing_speedups(groups: Sequence[SeedGroup], matchups: Sequence[Matchup]) -> Iterator[str]:
    matched = [matchup.grown for matchup in matchups]
    for group in groups:
        if group.runs[0].grown and group not in matched:
            yield (
                f"The speedup of {group.name} is unknown: add a run from scratch with the same "
                f"{group.runs[0].parameters[-1]:,} parameters."
            )
    for matchup in matchups:
        if mixing_times(matchup) is None:
            yield (
                f"The mixing time of {matchup.grown.name} is unknown: {matchup.scratch.name} ends "
                "before the growth; train it on as many tokens."
            )
        if not _defined(matchup):
            yield (
                f"No {matchup.kind} loss is reached by both {matchup.grown.name} and "
                f"{matchup.scratch.name}, so the speedup is undefined."
            )


def _unfair(groups: Sequence[SeedGroup]) -> Iterator[str]:
    """Yield the differences that make a comparison of several runs weaker."""
    if len(groups) < 2:
        return
    runs = [run for group in groups for run in group.runs]
    if len({run.setting.loss_data for run in runs if run.setting}) > 1:
        yield (
            "The runs differ in validation corpus, tokenizer or sequence length, so their losses "
            "are not comparable."
        )
    if len({run.origin.hardware for run in runs if run.origin.device}) > 1:
        yield "The runs used different hardware, so their training times are not comparable."
    if all(len(group.runs) == 1 for group in groups):
        yield "Every setting was run with one seed: there are no error bars."


def _join(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
