import math
import statistics
from typing import Any

import pytest

from megagrow.analysis.growth_transient import (
    Spread,
    loss_at,
    paired_spread,
    read_transient,
    spread,
    tokens_to_reach,
)
from megagrow.errors import InputError

GROWN_AT = 1000


def validation(tokens: int, loss: float | None, stage: int = 1) -> dict[str, Any]:
    return {"kind": "validation", "tokens": tokens, "loss": loss, "stage": stage}


def growth(before: float = 3.0, after: float | None = 4.5) -> dict[str, Any]:
    losses = {"loss_before": before, "loss_after": after}
    return {"kind": "growth", "tokens": GROWN_AT, "stage": 1, **losses}


def metrics() -> list[dict[str, Any]]:
    """A loss of 3.2 before the growth, of 4.0, 3.4, 3.0, 2.8 at 100, 200, 300, 400 tokens after."""
    after = zip((1100, 1200, 1300, 1400), (4.0, 3.4, 3.0, 2.8), strict=True)
    return [
        validation(500, 3.9, stage=0),
        validation(GROWN_AT, 3.2, stage=0),
        growth(),
        *(validation(tokens, loss) for tokens, loss in after),
    ]


def test_aftermath_of_hand_made_metrics() -> None:
    found = read_transient(metrics(), first_tokens=200)
    assert found.before == 3.2
    assert found.spike == pytest.approx(1.5)
    assert found.excess == pytest.approx(0.8)
    assert found.recovery == pytest.approx(250)  # half-way from 3.4 to 3.0
    assert (found.quarter, found.half, found.end) == pytest.approx((4.0, 3.4, 2.8))
    assert found.validation == ((100, 4.0), (200, 3.4), (300, 3.0), (400, 2.8))


def test_excess_looks_at_the_first_tokens_only() -> None:
    late = [*metrics()[:-1], validation(1400, 9.0)]
    assert read_transient(late, first_tokens=300).excess == pytest.approx(0.8)
    assert read_transient(late, first_tokens=400).excess == pytest.approx(5.8)


def test_excess_is_negative_where_the_growth_did_no_harm() -> None:
    calm = [*metrics()[:3], validation(1100, 3.1), validation(1200, 3.0)]
    assert read_transient(calm, first_tokens=200).excess == pytest.approx(-0.1)


def test_quarter_between_measurements_starts_from_the_spike() -> None:
    """3.2 + 1.5 at the growth, 3.7 at 100 tokens: 4.2 at 50, a quarter of 200."""
    short = [*metrics()[:3], validation(1100, 3.7), validation(1200, 3.5)]
    assert read_transient(short, first_tokens=200).quarter == pytest.approx(4.2)


def test_last_growth_counts() -> None:
    later = {**growth(2.0, 2.25), "tokens": 1400, "stage": 2}
    again = [*metrics(), later, validation(1500, 2.9, stage=2), validation(1600, 2.7, stage=2)]
    found = read_transient(again, first_tokens=100)
    assert (found.before, found.spike, found.excess) == pytest.approx((2.8, 0.25, 0.1))


@pytest.mark.parametrize(
    ("records", "named"),
    [
        (metrics()[:2], "some run: no growth was recorded"),
        (metrics()[2:], "some run: a loss at the growth"),
        (metrics()[:3], "some run: a loss at the growth"),
        ([*metrics(), validation(1500, None)], "some run: a loss at the growth"),
        ([*metrics()[:2], growth(after=None), *metrics()[3:]], "some run: a loss at the growth"),
    ],
    ids=["no growth", "nothing before", "nothing after", "diverged", "infinite spike"],
)
def test_metrics_that_lack_something_are_named(records: list[dict[str, Any]], named: str) -> None:
    with pytest.raises(InputError, match=named):
        read_transient(records, first_tokens=100, where="some run")


def test_recovery_is_to_stay() -> None:
    """A dip below and back above does not count."""
    curve = [(0.0, 5.0), (100.0, 2.0), (200.0, 4.0), (300.0, 3.0), (400.0, 2.0)]
    assert tokens_to_reach(curve, 3.5) == pytest.approx(250)
    assert tokens_to_reach(curve, 6.0) == 0.0
    assert tokens_to_reach(curve, 1.5) is None


def test_loss_is_not_read_outside_the_curve() -> None:
    with pytest.raises(ValueError, match="outside the curve"):
        loss_at([(0.0, 1.0), (10.0, 2.0)], 11)


def test_spread_is_that_of_a_sample() -> None:
    values = [1.0, 2.0, 4.5]
    found = spread(values)
    assert found is not None
    assert found.mean == pytest.approx(2.5)
    assert found.deviation == pytest.approx(math.sqrt((1.5**2 + 0.5**2 + 2.0**2) / 2))
    assert found.margin == pytest.approx(
        4.30265 * statistics.stdev(values) / math.sqrt(3), rel=1e-6
    )
    assert found.count == 3


def test_spread_of_one_seed_is_unknown_and_never_clear() -> None:
    found = spread([1.0])
    assert found is not None
    assert math.isnan(found.deviation)
    assert not found.is_clear


def test_no_spread_where_a_seed_has_no_value() -> None:
    assert spread([1.0, None, 2.0]) is None
    assert paired_spread([1.0, 2.0], [1.0, None]) is None
    assert spread([]) is None


def test_pairing_takes_out_what_the_seeds_share() -> None:
    found = paired_spread([3.1, 5.2, 4.15], [3.0, 5.0, 4.0])
    assert found is not None
    assert (found.mean, found.deviation) == pytest.approx((0.15, 0.05))
    assert found.is_clear  # 0.15 > 4.303 x 0.05 / sqrt(3) = 0.124
    other = paired_spread([3.1, 5.2, 3.95], [3.0, 5.0, 4.0])
    assert other is not None
    assert not other.is_clear


def test_pairs_need_equal_seeds() -> None:
    with pytest.raises(ValueError):
        paired_spread([1.0, 2.0], [1.0])


def test_margin_of_many_seeds_uses_their_degrees_of_freedom() -> None:
    assert Spread(0.0, 1.0, 100).margin == pytest.approx(1.98422 / 10, rel=1e-5)
