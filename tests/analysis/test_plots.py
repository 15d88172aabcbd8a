from collections.abc import Callable
from pathlib import Path

from megagrow.analysis.curves import load_curves
from megagrow.analysis.plots import PLOT_STYLES, plot_runs
from tests.helpers.analysis.images import colors


def test_every_run_is_drawn_in_its_own_color(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [
        load_curves(make_run("grown", [(20, 1000), (30, 4000, 1e8)])),
        load_curves(make_run("scratch", [(40, 4000)])),
    ]
    for log_x in (False, True):
        path = tmp_path / f"{log_x}.png"
        plot_runs(runs, path, log_x=log_x)
        seen = colors(path)
        assert {PLOT_STYLES[0].color, PLOT_STYLES[1].color} <= seen
        assert PLOT_STYLES[2].color not in seen


def test_looks_differ_without_color() -> None:
    assert (
        len({style.line for style in PLOT_STYLES})
        == len({style.marker for style in PLOT_STYLES})
        == len(PLOT_STYLES)
    )
