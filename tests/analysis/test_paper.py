"""Published results: consistency of the numbers, and the generated document."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megagrow.analysis.curves import load_curves
from megagrow.analysis.paper import compare_with_paper, paper_markdown, read_paper
from megagrow.analysis.report.files import load_report, write_report
from megagrow.analysis.seeds import group_runs, match_groups
from megagrow.growth.operators import OPERATORS
from tests.helpers.analysis.records import append

ROOT = Path(__file__).resolve().parents[2]
LARGE = 3_200_000
PAPER = read_paper()
TABLES = {table.title: table for table in PAPER.tables}


def test_document_is_written_from_the_data() -> None:
    written = (ROOT / "docs/results/paper-results.md").read_text(encoding="utf-8")
    assert written == paper_markdown(PAPER), "run: python tools/docs/paper_results.py"


def test_every_row_is_complete_and_has_a_source() -> None:
    for table in PAPER.tables:
        assert table.source and table.setting
        for row in table.rows:
            assert len(row.values) == len(table.columns), (table.title, row.name)
            assert row.operator is None or row.operator in OPERATORS


@pytest.mark.parametrize("title", ["Operators at 1.1B", "Instruction tuning at 3B"])
def test_published_averages_are_those_of_the_published_tasks(title: str) -> None:
    """Up to the rounding of eight numbers; some in Table 2 have one digit less."""
    table = TABLES[title]
    for row in table.rows:
        cells = dict(zip(table.columns, row.values, strict=True))
        tasks = [value for column, value in cells.items() if column.endswith(" acc %")]
        assert len(tasks) == 7
        assert sum(tasks) / 7 == pytest.approx(cells["average of 7 %"], abs=0.06), row.name


def test_headline_numbers() -> None:
    scaling = {(row.name, row.values[0]): row.values[1] for row in TABLES["Scaling G_stack"].rows}
    assert scaling["7B", 300] == 54.6 == round(100 * (300 / 194 - 1), 1)
    assert (scaling["410M", 700], scaling["3B", 240]) == (31.0, 54.5)
    operators = {row.operator: row.values[0] for row in TABLES["Operators at 1.1B"].rows}
    assert operators == {
        **{"direct_depth": 49.1, "zero_depth": 46.6, "random_depth": -25.7, "learn_depth": 48.6},
        **{"direct_width": -0.7, "zero_width": -17.9, "random_width": -13.8, "learn_width": -15.4},
        None: 0.0,
    }
    hybrid = [row.values[1] for row in TABLES["Speedup of the hybrid"].rows]
    assert hybrid == [61.7, 61.5, 58.2]


def grown_by(operator: str, run: Path) -> Path:
    path = run / "metrics.jsonl"
    grown = f'"kind": "growth", "operator": "{operator}"'
    path.write_text(path.read_text().replace('"kind": "growth"', grown))
    results = {"sciq": {"acc": 0.5}, "wikitext": {"word_perplexity": 20.5}}
    append(run, kind="evaluation", results=results, average=0.5)
    return run


def test_run_is_compared_with_the_row_of_its_operator(make_run: Callable[..., Path]) -> None:
    runs = [
        grown_by("direct_depth", make_run("stacked", [(50, 800_000), (88, LARGE, 0.75e12)])),
        grown_by("solar", make_run("other", [(50, 800_000), (88, LARGE, 0.5e12)])),
        grown_by("none", make_run("scratch", [(100, LARGE)])),
    ]
    matchups = match_groups(group_runs([load_curves(run) for run in runs]))
    table = compare_with_paper(matchups, PAPER)
    names = ["stacked", "paper: G_direct up (G_stack)", "other", "scratch", "paper: scratch"]
    assert [row[0] for row in table.rows] == names
    cells = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    sp = 100 * matchups[0].levels["flops"][-1].mean
    assert (cells[0]["speedup %"], cells[1]["speedup %"]) == (f"{sp:.1f}", "49.1")
    assert (cells[0]["size"], cells[1]["size"]) == ("3,200,000", "1.1B")
    assert (cells[0]["sciq acc %"], cells[1]["sciq acc %"]) == ("50", "81.1")
    assert (cells[0]["wikitext perplexity"], cells[0]["piqa acc %"]) == ("20.5", "-")
    assert cells[3]["speedup %"] == cells[4]["speedup %"] == "0"
    assert "other: the paper has no result for its operator (solar)." in table.notes
    assert any("Model sizes, data and token counts differ" in note for note in table.notes)


def test_report_compares_with_the_paper_if_requested(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [make_run("grown", [(50, 800_000), (88, LARGE, 0.75e12)])]
    runs += [make_run("scratch", [(100, LARGE)])]
    write_report(load_report(runs, against_paper=True), tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "Comparison with the paper&#39;s operators" in page
    assert "the paper has no result for its operator (unknown)" in page
