"""The benchmarks of many ranks and of checkpoint saves run, and count what they should."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import MODEL
from tests.helpers.spawn import run_ranks
from tools.benchmarks.checkpoint import save
from tools.benchmarks.scale import ranks


def test_the_work_of_a_rank_does_not_grow_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "MODEL", ranks.MODEL.model_copy(update=MODEL))
    monkeypatch.setattr(ranks, "MEASURED_PERIODS", 1)
    ranks.main(tmp_path / "out.md", ranks=32)
    rows = (tmp_path / "out.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [count for _, count, *_ in cells] == ["31", "1", "2", "0", "1", "1", "1"]
    assert [last.partition(",")[0] for *_, last in cells[1:]] == [
        *("33 groups", "12 groups", "12 groups"),
        *("32 files", "32 files", "32 files"),
    ]


def measured(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "init_process_group", lambda _: torch.device("cpu"))
        patch.setattr(save, "leave_process_group", lambda: None)
        patch.setattr(save, "REPEATS", 1)
        patch.setitem(save.SIZES, "tiny", {**MODEL, "hidden_size": 64})
        save.measure("tiny", str(folder), folder / "out.json")


@pytest.mark.dist
def test_saves_are_measured(tmp_path: Path) -> None:
    run_ranks(1, measured, tmp_path)
    values = json.loads((tmp_path / "out.json").read_text())
    assert all(cell.format(**values) for cell in save.COLUMNS.values())
    assert 0 < values["stall"] < values["seconds"]
