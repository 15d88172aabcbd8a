"""The paper's numbers, against the paper."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.common.yaml_file import read_mapping
from megagrow.config.growth_guidelines import RATES, connection_rate, rate_for_size
from megagrow.config.schema import ModelConfig
from megagrow.growth.depth import interpolated_layers, stacked_layers
from megagrow.model.layers.flops import parameters
from tests.helpers.hugging_face import tiny

MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"


def layers(*parts: tuple[str, int]) -> list[int]:
    """Layers numbered from 1 as the paper writes them, each run of them so many times."""
    return [int(digit) - 1 for digits, times in parts for digit in digits * times]


@pytest.mark.parametrize(
    ("parts", "printed"),
    [
        ([("123456", 4)], 87.0),
        ([("12", 1), ("3456", 5), ("56", 1)], 78.3),
        ([("12", 1), ("345", 7), ("6", 1)], 74.0),
        ([("123", 1), ("456", 7)], 74.0),
        ([("1234", 1), ("56", 10)], 60.7),
        ([("12", 1), ("34", 10), ("56", 1)], 60.7),
        ([("1", 1), ("234", 7), ("56", 1)], 74.0),
        ([("123", 7), ("456", 1)], 74.0),
    ],
)
def test_connection_rate_of_the_papers_table_5(
    parts: list[tuple[str, int]], printed: float
) -> None:
    """It prints 17/23 = 73.91% as 74.0 and 14/23 = 60.87% as 60.7: within 0.2 points."""
    chosen = layers(*parts)
    assert len(chosen) == 24
    assert 100 * connection_rate(chosen) == pytest.approx(printed, abs=0.2)


def test_connection_rate_of_stacking_and_interpolation() -> None:
    assert 100 * connection_rate(stacked_layers(8, 24)) == pytest.approx(91.3, abs=0.05)
    models = [tiny(num_hidden_layers=layers) for layers in (8, 24)]
    assert 100 * connection_rate(interpolated_layers(*models)) == pytest.approx(30.4, abs=0.05)


@pytest.mark.parametrize(
    ("chosen", "rate"),
    [([0, 0, 0], 0.0), ([0, 1, 2], 1.0), ([0], 1.0), ([0, -1, 0, 1], 1 / 3), ([-1, 0], 0.0)],
)
def test_connection_rate_of_short_lists(chosen: list[int], rate: float) -> None:
    assert connection_rate(chosen) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("name", "rate"), [("410m", 6e-4), ("1.1b", 3e-4), ("3b", 1.6e-4), ("7b", 1e-4)]
)
def test_the_papers_models_have_the_papers_rates(name: str, rate: float) -> None:
    model = ModelConfig.model_validate(read_mapping(MODELS / f"llama-{name}.yaml"))
    assert parameters(model) in dict(RATES)
    assert rate_for_size(parameters(model)) == pytest.approx(rate)


def test_rates_between_and_beyond_the_papers_sizes() -> None:
    (low, low_rate), (high, high_rate) = RATES[:2]
    middle = round((low * high) ** 0.5)
    assert rate_for_size(middle) == pytest.approx((low_rate * high_rate) ** 0.5)
    assert rate_for_size(round(low * low / high)) == pytest.approx(2 * low_rate)
    (low, low_rate), (high, high_rate) = RATES[2:]
    assert rate_for_size(round(high * high / low)) == pytest.approx(high_rate**2 / low_rate)


@given(small=st.integers(10**3, 10**13), by=st.integers(1, 10**12))
def test_a_larger_model_has_a_lower_rate(small: int, by: int) -> None:
    assert rate_for_size(small) >= rate_for_size(small + by) > 0
