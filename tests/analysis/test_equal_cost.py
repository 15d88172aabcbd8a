"""Losses of settings at equal FLOPs, tokens and training time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megagrow.analysis.curves import RunCurves, Series, load_curves
from megagrow.analysis.equal_cost import equal_costs
from megagrow.analysis.report.conclusion import conclude, missing
from megagrow.analysis.seeds import SeedGroup

NAMES = ("a", "b", "c")


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Callable[..., RunCurves]:
    """A run whose validation losses are given, with so many tokens, FLOPs and seconds between."""
    base = load_curves(make_run("base", [(20, 1000)]))

    def make(name: str, losses: list[float], tokens: int, flops: float, time: float) -> RunCurves:
        at = range(1, len(losses) + 1)
        flops_at = tuple(flops * i for i in at)
        seconds, count = tuple(time * i for i in at), tuple(tokens * i for i in at)
        series = Series(count, flops_at, flops_at, seconds, tuple(losses))
        return replace(base, name=name, validation=series)

    return make


def groups(*runs: RunCurves) -> list[SeedGroup]:
    return [SeedGroup((run,)) for run in runs]


def test_losses_are_interpolated_at_the_largest_shared_cost(run: Callable[..., RunCurves]) -> None:
    """After 40 tokens, a is at 2.0; b is halfway between 3.0 and 2.6. b has twice the FLOPs."""
    a = run("a", [4.0, 3.0, 2.5, 2.0], tokens=10, flops=1.0, time=0.5)
    b = run("b", [3.5, 3.0, 2.6], tokens=16, flops=2.0, time=1.0)
    flops, tokens, seconds = equal_costs(groups(a, b))
    assert (tokens.axis, tokens.at) == ("tokens", 40)
    assert {one.name: one.mean for one in tokens.groups} == pytest.approx({"a": 2.0, "b": 2.8})
    assert (flops.axis, flops.at, flops.second.mean) == ("flops", 4.0, 3.0)
    assert (seconds.axis, seconds.at, seconds.second.mean) == ("seconds", 2.0, 3.0)


def test_an_axis_without_a_shared_cost_is_omitted(run: Callable[..., RunCurves]) -> None:
    """b has ended after 3 seconds, before the first measurement of a."""
    a = run("a", [4.0, 3.0], tokens=10, flops=1.0, time=5.0)
    b = run("b", [3.5, 3.0, 2.6], tokens=10, flops=1.0, time=1.0)
    assert [one.axis for one in equal_costs(groups(a, b))] == ["flops", "tokens"]


def test_each_winner_gets_a_sentence(run: Callable[..., RunCurves]) -> None:
    a = run("a", [4.0, 3.0, 2.5], tokens=10, flops=1.0, time=1.0)
    b = run("b", [4.0, 3.5, 2.0], tokens=10, flops=4.0, time=1.0)
    both = groups(a, b)
    first, *sentences = conclude(both, [], equal_costs(both))
    assert first == "Final validation loss: a 2.5000, b 2.0000."
    assert sentences == [
        "b has the lower loss at equal tokens (by 0.5000) and training time (by 0.5000).",
    ]


def test_overlapping_seeds_are_stated(run: Callable[..., RunCurves]) -> None:
    first, second, other = (
        run(name, [4.0, loss], tokens=10, flops=1.0, time=1.0)
        for name, loss in zip(NAMES, (2.0, 2.4, 2.3), strict=True)
    )
    both = [SeedGroup((first, second)), SeedGroup((other,))]
    sentences = conclude(both, [], equal_costs(both))
    assert "FLOPs (by 0.1000, within the range over seeds)" in sentences[1]


def test_three_settings_are_ranked(run: Callable[..., RunCurves]) -> None:
    runs = [
        run(name, [4.0, loss], tokens=10, flops=1.0, time=1.0)
        for name, loss in zip(NAMES, (2.5, 2.0, 2.2), strict=True)
    ]
    lines = conclude(groups(*runs), [], equal_costs(groups(*runs)))
    assert lines[0] == (
        "b has the lowest final validation loss of 3 settings, 2.0000; c follows with 2.2000."
    )
    assert lines[1].startswith("b has the lowest loss at equal FLOPs (by 0.2000 to c), tokens (by ")


def test_unfair_comparisons_are_stated(run: Callable[..., RunCurves]) -> None:
    a, b = (run(name, [4.0, 3.0], tokens=10, flops=1.0, time=1.0) for name in "ab")
    hardware = [replace(a.origin, device=device, ranks=8) for device in ("H100", "A100")]
    a, b = (replace(one, origin=origin) for one, origin in zip((a, b), hardware, strict=True))
    assert missing(groups(a, b), []) == [
        "The runs used different hardware, so their training times are not comparable.",
        "Every setting was run with one seed: there are no error bars.",
    ]
