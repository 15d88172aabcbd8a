"""A run with malformed records raises an error with the file's path."""

import json
from pathlib import Path

import pytest

from megagrow.analysis.curves import load_curves
from megagrow.errors import InputError
from megagrow.train.reporting.metrics import METRICS_FILE
from tests.helpers.analysis.records import append
from tests.helpers.written_runs import Stage, write_run


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("start", {"run_steps": None}),
        ("start", {"parameters": 3}),
        ("train", {"loss": "low"}),
        ("validation", {"loss": [1]}),
        ("end", {"elapsed_seconds": ...}),
        ("start", {"name": 5}),
        ("start", {"parameters": []}),
        ("start", {"parameters": [10, -1]}),
        ("start", {"parameters": [10**19, 10]}),
        ("train", {"elapsed_seconds": 1e60}),
        ("train", {"flops": 1e-300}),
        ("train", {"loss": 1e60}),
        ("train", {"grad_norm": -1e60}),
        ("validation", {"flops_true": -1.0}),
        ("growth", {"stage": 0}),
        ("growth", {"stage": 2}),
        ("growth", {"operator": {"a": 1}}),
        ("end", {"tokens": 1}),
        ("end", {"elapsed_seconds": 0}),
        ("evaluation", {"results": {"sciq": {"acc": 1e60}}}),
        ("samples", {"samples": [{"prompt": "a"}]}),
        ("samples", {"samples": [{"prompt": "a", "text": None}]}),
        ("samples", {"samples": 3}),
    ],
)
def test_malformed_record_raises(tmp_path: Path, kind: str, changes: dict) -> None:
    folder = write_run(tmp_path / "run", [Stage(20, 100), Stage(10, 200)])
    append(folder, kind="evaluation", results={"sciq": {"acc": 0.5}}, average=0.5)
    append(folder, kind="samples", samples=[])
    assert load_curves(folder).name == "run"
    path = folder / METRICS_FILE
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in (r for r in records if r["kind"] == kind):
        record |= changes
        for name in [name for name, value in changes.items() if value is ...]:
            del record[name]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(InputError, match=r"metrics\.jsonl: a record is malformed"):
        load_curves(folder)
