"""Equation 2 of the paper, compared with the paper's table."""

import pytest

from megagrow.config.growth_guidelines import FITTED_FLOPS, growth_tokens, outside_fit


@pytest.mark.parametrize(
    ("size", "tokens", "printed"),
    [
        (8e9, 15e12, 6.58e9),
        (7e9, 2e12, 11.11e9),
        (13e9, 2e12, 15.84e9),
        (70e9, 2e12, 42.48e9),
    ],
)
def test_the_papers_table_4(size: float, tokens: float, printed: float) -> None:
    assert growth_tokens(size, tokens) == pytest.approx(printed, rel=1e-3)
    assert "C = 6ND" in (outside_fit(size, tokens) or "")


def test_it_rises_with_the_model_and_falls_with_the_budget() -> None:
    assert growth_tokens(2e9, 100e9) > growth_tokens(1e9, 100e9) > growth_tokens(1e9, 300e9)


@pytest.mark.parametrize(
    ("size", "tokens", "found"),
    [
        (308.3e6, 100e9, None),  # the paper's 410M
        (2233.6e6, 80e9, None),  # its 3B
        (77.1e6, 100e9, "N = 7.71e+07 (fitted: 3e+08 to 3e+09)"),
        (1e9, 2e11, None),
        (1e9, 2.01e11, "C = 6ND = 1.21e+21 (fitted: up to 1.2e+21)"),
        (
            8e9,
            15e12,
            "N = 8e+09 (fitted: 3e+08 to 3e+09) and C = 6ND = 7.2e+23 (fitted: up to 1.2e+21)",
        ),
    ],
)
def test_what_lies_outside_the_fit(size: float, tokens: float, found: str | None) -> None:
    assert FITTED_FLOPS == 1.2e21
    assert outside_fit(size, tokens) == found
