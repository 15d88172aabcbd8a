"""Counts as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.common.sizes import (
    UNITS,
    format_bytes,
    format_count,
    format_large,
    parse_bytes,
    parse_count,
)


@pytest.mark.parametrize(
    ("written", "count"),
    [
        (2048, 2048),
        ("2048", 2048),
        ("2_000", 2000),
        ("2M", 2_000_000),
        ("1.5B", 1_500_000_000),
        ("10K", 10_000),
        ("10k", 10_000),
        ("3T", 3_000_000_000_000),
        ("1e9", 1_000_000_000),
        ("1.5e3", 1500),
        (1e9, 1_000_000_000),
        (" 7 M ", 7_000_000),
        ("0.001K", 1),
        (0, 0),
        ("97.5B", 97_500_000_000),
        # 0.1 + 0.2 is not 0.3 in binary; decimals are exact.
        ("4.35K", 4350),
    ],
)
def test_what_is_accepted(written: object, count: int) -> None:
    got = parse_count(written)
    assert got == count
    assert type(got) is int


@pytest.mark.parametrize("written", ["1.5", "0.0001K", 2.5, "1.0005K"])
def test_a_fraction_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="not a whole number"):
        parse_count(written)


@pytest.mark.parametrize(
    "written",
    [
        -1,
        "-2M",
        "",
        "M",
        "2X",
        "2MB",
        "two",
        "1e-3",
        "1e999999999",
        "__1",
        "1_",
        "1,000",
        "0x10",
        True,
        None,
        [1],
        float("nan"),
        float("inf"),
    ],
)
def test_nonsense_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="should be a whole number"):
        parse_count(written)


@given(st.integers(0, 10**18))
def test_formatting_is_exact(count: int) -> None:
    assert parse_count(format_count(count)) == count


@given(st.integers(1, 99_999), st.sampled_from(sorted(UNITS)))
def test_two_decimals_are_read_exactly(hundredths: int, suffix: str) -> None:
    written = f"{hundredths // 100}.{hundredths % 100:02d}{suffix}"
    assert parse_count(written) == hundredths * UNITS[suffix] // 100


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (2048, "2048"),
        (32_000, "32K"),
        (2_097_152, "2097152"),
        (97_500_000_000, "97.5B"),
        (12_340_000, "12.34M"),
        (3 * 10**15, "3000T"),
    ],
)
def test_how_counts_are_shown(count: int, text: str) -> None:
    assert format_count(count) == text


@given(st.integers(1, 10**25))
def test_large_numbers_are_exact_even_by_way_of_a_float(count: int) -> None:
    text = format_large(count)
    assert parse_count(text) == count
    if "e" in text:
        assert parse_count(float(text)) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (10**20, "1e20"),
        (12 * 10**20, "1.2e21"),
        (7, "7e0"),
        (123_456_789_012_345_678, "123456789012345678"),
    ],
)
def test_how_large_numbers_are_shown(count: int, text: str) -> None:
    assert format_large(count) == text


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("1GiB", 2**30),
        ("512 mib", 2**29),
        ("1.5GB", 1_500_000_000),
        ("5KB", 5000),
        ("0.5TiB", 2**39),
        ("12 B", 12),
        ("4096", 4096),
    ],
)
def test_bytes_are_read(written: str, count: int) -> None:
    assert parse_bytes(written) == count


@pytest.mark.parametrize("written", ["", "much", "-1GiB", "1 GiB 2", "1G", "1iB", "GiB"])
def test_what_is_no_number_of_bytes(written: str) -> None:
    with pytest.raises(ValueError, match="such as 1GiB"):
        parse_bytes(written)


def test_bytes_are_written_for_people() -> None:
    counts = (0, 1023, 2**20, 3 * 2**29, 10 * 2**30, 2**40 + 1)
    said = ["0 B", "1023 B", "1 MiB", "1.5 GiB", "10 GiB", "1 TiB"]
    assert [format_bytes(count) for count in counts] == said
