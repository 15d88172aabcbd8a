import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.analysis.speedup import LossCurve, flops_to_reach, measure_speedup


def power_law(points: int, last: float, ahead: float = 1.0) -> LossCurve:
    """Return 8 (ahead C)^-0.1 at points evenly spaced in log FLOPs."""
    flops = tuple(last * 10 ** (-3 + 3 * index / (points - 1)) for index in range(points))
    return LossCurve(flops, tuple(8 * (one * ahead) ** -0.1 for one in flops))


@given(
    gain=st.floats(0.7, 1.9),
    longer=st.floats(0.6, 1.6),
    points=st.integers(60, 300),
    last=st.floats(1e12, 1e22),
)
def test_speedup_of_a_power_law_is_its_shift(
    gain: float, longer: float, points: int, last: float
) -> None:
    found = measure_speedup(power_law(points, last), power_law(points, last * longer, gain))
    assert found is not None
    assert found.speedup == pytest.approx(gain - 1, abs=5e-3)
    assert found.saved == pytest.approx(1 - 1 / gain, abs=5e-3)
    assert found.loss == max(found.final_scratch, found.final_grown)


@given(gain=st.floats(0.7, 1.9), seed=st.integers(1, 5))
def test_swapping_the_runs_inverts_the_ratio(gain: float, seed: int) -> None:
    one, other = power_law(50 + seed, 1e15), power_law(80, 1e15, gain)
    there, back = measure_speedup(one, other), measure_speedup(other, one)
    assert there is not None
    assert back is not None
    assert (1 + there.speedup) * (1 + back.speedup) == pytest.approx(1)


def test_papers_example() -> None:
    """300B tokens against 194B at the same loss: sp 54.6%, 35.3% fewer (PAPER section 5)."""
    scratch = LossCurve((1.0, 300.0), (9.0, 2.0))
    grown = LossCurve((1.0, 194.0, 300.0), (9.0, 2.0, 1.9))
    found = measure_speedup(scratch, grown)
    assert found is not None
    assert (found.loss, found.flops_scratch, found.flops_grown) == (2.0, 300.0, 194.0)
    assert found.speedup == pytest.approx(0.546, abs=5e-4)
    assert found.saved == pytest.approx(0.353, abs=5e-4)


def test_interpolation_is_linear_in_log_flops() -> None:
    curve = LossCurve((1e10, 1e12), (4.0, 2.0))
    assert flops_to_reach(curve, 3.0) == pytest.approx(1e11)
    assert flops_to_reach(curve, 3.5) == pytest.approx(10**10.5)


def test_first_point_may_be_before_any_training() -> None:
    assert flops_to_reach(LossCurve((0.0, 1e12), (4.0, 2.0)), 3.0) == pytest.approx(5e11)


def test_dip_before_the_spike_of_a_growth_does_not_count() -> None:
    curve = LossCurve((1.0, 10.0, 10.0, 100.0, 1000.0), (5.0, 3.0, 4.5, 3.5, 2.5))
    assert flops_to_reach(curve, 3.0) == pytest.approx(10**2.5)
    assert flops_to_reach(curve, 4.6) == pytest.approx(10**0.2)


def test_drop_at_equal_flops_is_reached_there() -> None:
    curve = LossCurve((1.0, 10.0, 10.0, 20.0), (5.0, 4.0, 2.0, 1.0))
    assert flops_to_reach(curve, 3.0) == pytest.approx(10.0)


@pytest.mark.parametrize("loss", [1.0, 5.0, 6.0])
def test_loss_outside_the_curve_is_not_reached(loss: float) -> None:
    assert flops_to_reach(LossCurve((1.0, 10.0), (5.0, 2.0)), loss) is None


def test_rise_at_the_end_counts_from_where_the_curve_stays() -> None:
    curve = LossCurve((1.0, 10.0, 100.0), (4.0, 2.0, 3.0))
    assert flops_to_reach(curve, 3.0) == pytest.approx(10**0.5)
    assert flops_to_reach(curve, 2.5) is None


def test_nothing_to_measure_where_a_curve_begins_below() -> None:
    low, high = LossCurve((1.0, 2.0), (1.0, 0.5)), LossCurve((1.0, 2.0), (4.0, 3.0))
    assert measure_speedup(low, high) is None
    assert measure_speedup(high, low) is None


@given(st.lists(st.floats(0.5, 9), min_size=2, max_size=30), st.floats(0.5, 9))
def test_curve_is_below_from_the_found_point_on(losses: list[float], loss: float) -> None:
    curve = LossCurve(tuple(float(at + 1) for at in range(len(losses))), tuple(losses))
    found = flops_to_reach(curve, loss)
    if found is None:
        assert losses[-1] > loss or max(losses) <= loss
    else:
        upto = sum(flops <= found * (1 + 1e-9) for flops in curve.flops)
        assert all(value <= loss for value in losses[upto:])
        assert max(losses[max(0, upto - 2) :]) > loss


@pytest.mark.parametrize(
    ("flops", "loss", "message"),
    [
        ((), (), "0 FLOPs and 0 losses"),
        ((1.0,), (1.0, 2.0), "1 FLOPs and 2 losses"),
        ((2.0, 1.0), (3.0, 2.0), "the FLOPs decrease"),
        ((1.0, 2.0), (3.0, math.nan), "not finite"),
    ],
)
def test_invalid_curves_raise(flops: tuple, loss: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossCurve(flops, loss)
