"""Parsing and formatting of counts, bytes and durations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagrow.common.sizes import (
    BYTE_UNITS,
    COUNT_UNITS,
    format_bytes,
    format_count,
    format_duration,
    format_in,
    format_large,
    format_short,
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
def test_accepted_counts(written: object, count: int) -> None:
    got = parse_count(written)
    assert got == count
    assert type(got) is int


@pytest.mark.parametrize("written", ["1.5", "0.0001K", 2.5, "1.0005K"])
def test_fractions_are_refused(written: object) -> None:
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
def test_other_values_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match="should be a whole number"):
        parse_count(written)


@given(st.integers(0, 10**18))
def test_formatting_is_exact(count: int) -> None:
    assert parse_count(format_count(count)) == count


@given(st.integers(1, 99_999), st.sampled_from(sorted(COUNT_UNITS)))
def test_two_decimals_are_read_exactly(hundredths: int, suffix: str) -> None:
    written = f"{hundredths // 100}.{hundredths % 100:02d}{suffix}"
    assert parse_count(written) == hundredths * COUNT_UNITS[suffix] // 100


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
def test_format_count(count: int, text: str) -> None:
    assert format_count(count) == text


@given(st.integers(1, 10**25))
def test_large_numbers_are_exact_after_conversion_to_float(count: int) -> None:
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
def test_format_large(count: int, text: str) -> None:
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
def test_parse_bytes(written: str, count: int) -> None:
    assert parse_bytes(written) == count


@pytest.mark.parametrize("written", ["", "much", "-1GiB", "1 GiB 2", "1G", "1iB", "GiB"])
def test_invalid_numbers_of_bytes_are_refused(written: str) -> None:
    with pytest.raises(ValueError, match="such as 1GiB"):
        parse_bytes(written)


def test_format_bytes() -> None:
    counts = (0, 1023, 2**20, 3 * 2**29, 10 * 2**30, 2**40 + 1)
    texts = ["0 B", "1023 B", "1 MiB", "1.5 GiB", "10 GiB", "1 TiB"]
    assert [format_bytes(count) for count in counts] == texts


@pytest.mark.parametrize("unit", BYTE_UNITS)
def test_format_in(unit: str) -> None:
    assert format_in(1234.56 * BYTE_UNITS[unit], unit, 1) == "1,234.6"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0s"),
        (75, "1m15s"),
        (59.7, "1m00s"),
        (4000, "1h06m"),
        (11520, "3h12m"),
        (184800, "2d03h"),
    ],
)
def test_format_duration(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(950, "950"), (12345, "12.3k"), (3.2e6, "3.2M"), (1.5e9, "1.5B"), (2e12, "2.0T")],
)
def test_format_short(number: float, text: str) -> None:
    assert format_short(number) == text


@pytest.mark.parametrize("written", ["9" * 5000, "9" * 5000 + "GiB", "1000001TB"])
def test_more_bytes_than_any_machine_has_are_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"is more than 1e\+18 bytes"):
        parse_bytes(written)
