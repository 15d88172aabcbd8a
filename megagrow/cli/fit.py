"""The command line's `megagrow fit`: guidelines from one's own runs (docs/guides/fits.md)."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from megagrow.common.json_text import finite
from megagrow.errors import ConfigError, unwritable

if TYPE_CHECKING:
    from megagrow.fits.data import Data, IsoPoint

fit_app = typer.Typer(
    help="Fit guidelines to one's own runs: when to grow, how much, and what it saves.",
    no_args_is_help=True,
)

PIPED_WIDTH = 200
"""Columns of a table that goes into a file or a pipe, which has no width of its own."""

Sources = Annotated[
    list[Path],
    typer.Argument(help="Directories of finished runs, or one CSV file.", show_default=False),
]
Output = Annotated[Path, typer.Option(help="Folder of the JSON file and the plot.")]
Budgets = Annotated[
    str | None,
    typer.Option(metavar="C,C,...", help="FLOPs at which run directories are read: 1e17,2e17."),
]


@fit_app.command()
def timing(sources: Sources, output: Output, budgets: Budgets = None) -> None:
    """When to grow: the constants of log10 d = a log10 N + b / log10 C + c."""
    from megagrow.fits.plots import plot_timing
    from megagrow.fits.tables import parabola_table, print_lines, refusals, timing_table
    from megagrow.fits.timing import PAPER, fit_timing, timing_parabolas

    console = _console()
    data = _iso_data(sources, budgets, "base_tokens")
    print_lines(console, data.notes)
    parabolas = timing_parabolas(data)
    console.print(parabola_table(parabolas, "d (tokens)"))
    print_lines(console, refusals(parabolas))
    fit = fit_timing(data.source, parabolas)
    console.print(timing_table(fit))
    found = {"fit": asdict(fit), "paper": PAPER, "parabolas": [asdict(p) for p in parabolas]}
    plot = _write(output, "timing", found | {"notes": data.notes})
    plot_timing(data.points, parabolas, fit, plot)
    print_lines(console, [f"Plot: {plot}"])


@fit_app.command()
def factor(sources: Sources, output: Output, budgets: Budgets = None) -> None:
    """How much to grow by: the growth factor g of the least loss at equal FLOPs."""
    from megagrow.fits.parabola import PAPER_BEST, factor_parabolas, fit_factor
    from megagrow.fits.plots import plot_factor
    from megagrow.fits.tables import factor_table, parabola_table, print_lines, refusals

    console = _console()
    data = _iso_data(sources, budgets, "factor")
    print_lines(console, data.notes)
    parabolas = factor_parabolas(data)
    console.print(parabola_table(parabolas, "g"))
    print_lines(console, refusals(parabolas))
    fit = fit_factor(data, parabolas)
    console.print(factor_table(fit))
    found = {"fit": asdict(fit), "paper": PAPER_BEST, "parabolas": [asdict(p) for p in parabolas]}
    plot = _write(output, "factor", found | {"notes": data.notes})
    plot_factor(data.points, parabolas, fit, plot)
    print_lines(console, [f"Plot: {plot}"])


@fit_app.command()
def scaling(
    sources: Sources,
    output: Output,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="C,C,...",
            help="FLOPs at which the saving is told. Default: the largest of the data, and 10 x.",
        ),
    ] = None,
    floor: Annotated[
        bool, typer.Option("--floor/--no-floor", help="Whether e is fitted, or 0.")
    ] = True,
) -> None:
    """What growing saves: L = a C^b + e for scratch and for grown, extrapolated with its band."""
    from megagrow.fits.data import find_csv, parse_budgets, read_scaling_csv
    from megagrow.fits.plots import plot_scaling
    from megagrow.fits.runs import scaling_points
    from megagrow.fits.scaling import default_budgets, fit_scaling, saving_at
    from megagrow.fits.tables import print_lines, saving_table, scaling_lines, scaling_table

    console = _console()
    csv = find_csv(sources)
    data = read_scaling_csv(csv) if csv else scaling_points(sources)
    print_lines(console, data.notes)
    laws = fit_scaling(data, floor)
    asked = parse_budgets(budgets) if budgets else default_budgets(laws)
    savings = [saving_at(*laws, flops) for flops in asked]
    lines = scaling_lines(laws, savings)
    console.print(scaling_table(laws))
    console.print(saving_table(savings))
    print_lines(console, lines)
    found = {"laws": [asdict(law) for law in laws], "savings": [asdict(one) for one in savings]}
    plot = _write(output, "scaling", found | {"notes": (*data.notes, *lines)})
    plot_scaling(data.points, laws, savings, plot)
    print_lines(console, [f"Plot: {plot}"])


def _iso_data(
    sources: Sequence[Path], budgets: str | None, choice: Literal["base_tokens", "factor"]
) -> "Data[IsoPoint]":
    from megagrow.fits.data import find_csv, parse_budgets, read_iso_csv
    from megagrow.fits.runs import iso_points

    csv = find_csv(sources)
    if csv is None and budgets is None:
        raise ConfigError("--budgets is missing: at which FLOPs the runs are to be compared")
    if csv is not None and budgets is not None:
        raise ConfigError(f"--budgets is for run directories: {csv} has its own column 'flops'")
    if budgets is not None:
        return iso_points(sources, parse_budgets(budgets), choice)
    assert csv is not None
    return read_iso_csv(csv, choice, lower_bound=0.0 if choice == "base_tokens" else 1.0)


def _write(output: Path, name: str, found: dict[str, Any]) -> Path:
    """Writes the JSON file; returns where the plot goes."""
    path = output / f"{name}.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(finite(found), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise unwritable(path, error) from error
    return path.with_suffix(".png")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)
