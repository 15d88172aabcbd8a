"""Records added to the metrics of a run."""

import json
from pathlib import Path


def append(run: Path, **record: object) -> None:
    """A record more, just before the run's end."""
    path = run / "metrics.jsonl"
    *lines, end = path.read_text().splitlines(True)
    record = {**json.loads(end), **record}
    path.write_text("".join([*lines, json.dumps(record) + "\n", end]))
