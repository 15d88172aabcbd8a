"""Steps whose records are lost, against a step-by-step definition."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.train.reporting.lost_records import ranges_text, steps_without_record


@settings(max_examples=100, deadline=None)
@given(
    step=st.integers(0, 25),
    starts=st.dictionaries(st.integers(0, 25), st.integers(1, 6), max_size=3),
    lost=st.sets(st.integers(1, 25)),
)
def test_every_due_step_without_a_record_is_in_one_range(
    step: int, starts: dict[int, int], lost: set[int]
) -> None:
    """`starts`: the logging interval from each start of the run on."""
    starts = {0: 3} | starts
    records: list[dict[str, Any]] = []
    missing = set()
    for number in range(step + 1):
        every = starts[max((begin for begin in starts if begin < number), default=0)]
        if number > 0 and number not in lost:
            records.append({"kind": "train", "step": number})
        elif number > 0 and number % every == 0:
            missing.add(number)
        if number in starts:
            records.append({"kind": "start", "step": number, "logging_interval": starts[number]})
    ranges = steps_without_record(records, step, 99)
    assert {end for pair in ranges for end in pair} <= missing
    assert all(sum(first <= number <= last for first, last in ranges) == 1 for number in missing)
    covered = [record for record in records for first, last in ranges
               if record["kind"] == "train" and first <= record["step"] <= last]  # fmt: skip
    due = {record["step"] for record in covered} & {n for n in range(step + 1) if n not in lost}
    assert all(number % starts[max(b for b in starts if b < number)] for number in due)
    again = [*records, {"kind": "lost", "step": step, "steps": ranges}]
    assert steps_without_record(again, step, 99) == []


def test_a_part_without_a_known_interval_is_passed_over() -> None:
    records = [{"kind": "start", "step": 0}, {"kind": "start", "step": 9, "logging_interval": 2}]
    assert steps_without_record(records, 13, 1) == [[10, 12]]
    wrong = [{"kind": "start", "step": 0, "logging_interval": x} for x in (-1, "2", 2.5)]
    assert steps_without_record([*wrong, {"kind": "lost", "step": 9, "steps": "x"}], 13, 1) == []


def test_a_missing_file_lacks_everything_at_once() -> None:
    assert steps_without_record([], 10**12, 1) == [[1, 10**12]]


def test_ranges_are_counted_beyond_the_first_few() -> None:
    assert ranges_text([[11, 14], [17, 17]]) == "11 to 14, 17"
    assert ranges_text([[n, n] for n in range(8)]) == "0, 1, 2, 3, 4 and 3 more ranges"
