import json
import statistics
from pathlib import Path

import pytest

from megagrow.analysis.ablation import Study, Variant, as_json, markdown, plot
from megagrow.analysis.growth_transient import GrowthTransient
from megagrow.analysis.plots import PLOT_STYLES
from tests.helpers.analysis.images import colors

REWARM, CONTINUE = Variant("transport", "rewarm"), Variant("transport", "continue")
RESET = Variant("reset", "continue")


def run(end: float, excess: float = 0.5, recovery: float | None = 20_000.0) -> GrowthTransient:
    points = ((10_000, 3.0 + excess), (40_000, end))
    return GrowthTransient(3.0, 1.25, excess, recovery, 2.9, 2.8, end, points)


@pytest.fixture
def study() -> Study:
    """Ends of 2.5, 2.6, 2.8; continued 0.1 better in each seed, and reset 0.2 worse in the mean but
    not in every seed."""
    return Study(
        seeds=(1, 2, 3),
        runs={
            REWARM: (run(2.5), run(2.6), run(2.8)),
            CONTINUE: (run(2.4), run(2.5), run(2.7)),
            RESET: (run(2.4, recovery=None), run(2.9), run(3.2)),
        },
        scores={
            "end, all text": {
                REWARM: (3.5, 3.6, 3.8),
                CONTINUE: (3.45, 3.55, 3.75),
                RESET: (3.4, 3.6, 3.9),
            }
        },
        scratch={"loss at the end": (2.7, 2.8, 2.9), "end, all text": (3.7, 3.8, 3.9)},
    )


def cells(table: str, row: str) -> list[str]:
    """Return the other cells of the row whose first cell is `row`."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    (found,) = [cells for cells in rows if cells[0] == row]
    return found[1:]


def test_values_are_means_with_deviations(study: Study) -> None:
    values, _, _ = markdown(study, REWARM).split("\n\n")
    spread = statistics.stdev([2.5, 2.6, 2.8])
    ends = f"{(2.5 + 2.6 + 2.8) / 3:.3f} \u00b1 {spread:.3f}"
    assert cells(values, "transport, rewarm")[-2] == ends
    assert cells(values, "transport, rewarm")[2] == "20.0K \u00b1 0.0K"
    assert cells(values, "reset, continue")[2] == "not in all runs"
    scratch = cells(values, "from scratch, equal FLOPs")
    assert scratch == ["-"] * 5 + ["2.800 \u00b1 0.100", "3.800 \u00b1 0.100"]


def test_differences_are_paired_and_the_clear_ones_bold(study: Study) -> None:
    _, against_rewarm, against_continue = markdown(study, REWARM).split("\n\n")
    assert cells(against_rewarm, "transport, continue")[-2] == "**-0.100 \u00b1 0.000**"
    margin = 4.303 * statistics.stdev([-0.1, 0.3, 0.4]) / 3**0.5
    assert cells(against_rewarm, "reset, continue")[-2] == f"+0.200 \u00b1 {margin:.3f}"
    margin = 4.303 * statistics.stdev([0.0, 0.4, 0.5]) / 3**0.5
    assert cells(against_continue, "reset, continue")[-2] == f"+0.300 \u00b1 {margin:.3f}"
    assert cells(against_continue, "reset, continue")[1] == "-"
    assert cells(against_rewarm, "transport, continue")[-1] == "**-0.050 \u00b1 0.000**"


def test_numbers_of_every_run_are_kept(study: Study) -> None:
    found = json.loads(as_json(study))
    assert found["runs"]["reset, continue"][1]["end"] == 2.9
    assert found["runs"]["reset, continue"][0]["recovery"] is None
    assert found["scores"]["end, all text"]["reset, continue"][2] == 3.9
    assert found["scratch"]["loss at the end"] == [2.7, 2.8, 2.9]


def test_policies_differ_in_color(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot(study, REWARM, path)
    seen = colors(path)
    assert {PLOT_STYLES[0].color, PLOT_STYLES[1].color} <= seen
    assert PLOT_STYLES[2].color not in seen
    assert path.stat().st_size < 200_000
