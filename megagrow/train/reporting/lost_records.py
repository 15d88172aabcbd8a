"""Steps of a run whose train records are lost, such as by a power failure or an edited file."""

from collections.abc import Iterable, Iterator, Sequence

from megagrow.train.reporting.writers import Record

StepRanges = list[list[int]]
"""First and last step of each range."""


def steps_without_record(records: Sequence[Record], step: int, interval: int) -> StepRanges:
    """Return the steps up to `step` that lack their train record.

    A range stands for the multiples of `logging.interval` from its first to its last step. Ranges
    reported by an earlier `lost` record are left out.

    Args:
        records: records of metrics.jsonl up to `step`, in order.
        step: step from which the run resumes.
        interval: `logging.interval`, for a file without `start` record.
    """
    found = sorted({record["step"] for record in records if record["kind"] == "train"})
    reported = [pair for record in records for pair in _reported(record)]
    return [
        [first, last]
        for due in _due_steps(records, step, interval)
        for first, last in _gaps(due, [number for number in found if number in due])
        if not any(begin <= first and last <= end for begin, end in reported)
    ]


def ranges_text(ranges: StepRanges, most: int = 5) -> str:
    """Return ranges as text: `11 to 14, 17 and 3 more ranges`."""
    shown = [f"{first} to {last}" if last > first else str(first) for first, last in ranges[:most]]
    more = f" and {len(ranges) - most} more ranges" if len(ranges) > most else ""
    return ", ".join(shown) + more


def _due_steps(records: Iterable[Record], step: int, interval: int) -> Iterator[range]:
    """Yield the steps that are due for a train record, for each part of the run in order.

    Each `start` record has the interval of the steps after it. Earlier versions did not record it;
    there, no record is due.
    """
    starts: list[tuple[int, int]] = []
    for record in records:
        if record["kind"] == "start":
            every = record.get("logging_interval", 0)
            starts = [start for start in starts if start[0] < record["step"]]
            starts.append((record["step"], every if type(every) is int else 0))
    if not starts or starts[0][0] > 0:  # the beginning of the file is lost
        starts.insert(0, (0, starts[0][1] if starts else interval))
    ends = [begin for begin, _ in starts[1:]]
    for (begin, every), end in zip(starts, [*ends, step], strict=True):
        if every > 0:
            yield range(begin // every * every + every, min(end, step) + 1, every)


def _gaps(due: range, found: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and last step of each part of `due` without a found step."""
    if due:
        first = due[0]
        for number in (*found, due[-1] + due.step):
            if number > first:
                yield first, number - due.step
            first = number + due.step


def _reported(record: Record) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a `lost` record."""
    ranges = record.get("steps") if record["kind"] == "lost" else None
    for pair in ranges if isinstance(ranges, list) else []:
        if isinstance(pair, list) and [type(number) for number in pair] == [int, int]:
            yield pair[0], pair[1]
