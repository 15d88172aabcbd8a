"""`megagrow fit`: fit growth guidelines to measured runs (docs/guides/fits.md)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megagrow.cli.options import existing_paths
from megagrow.common.atomic_files import write_text
from megagrow.common.json_text import format_json
from megagrow.common.tables import print_lines, print_table, table_console
from megagrow.errors import ConfigError, unwritable

if TYPE_CHECKING:
    from megagrow.fits.data import Data, IsoPoint
    from megagrow.fits.parabola import Parabola

fit_app = typer.Typer(
    help="Fit guidelines to measured runs: growth timing, growth factor, FLOPs saved.",
    no_args_is_help=True,
)

Sources = Annotated[
    list[Path],
    typer.Argument(
        help="Directories of finished runs, or one CSV file.",
        show_default=False,
        callback=existing_paths,
    ),
]
Output = Annotated[Path, typer.Option(help="Folder for the JSON file and the plot.")]
Budgets = Annotated[
    str | None,
    typer.Option(metavar="C,C,...", help="FLOPs at which runs are compared, such as 1e17,2e17."),
]


@fit_app.command()
def timing(sources: Sources, output: Output, budgets: Budgets = None) -> None:
    """Fit the growth timing: the constants of log10 d = a log10 N + b / log10 C + c."""
    from megagrow.fits.plots import plot_timing
    from megagrow.fits.tables import timing_table
    from megagrow.fits.timing import PAPER, fit_timing, timing_parabolas

    data = _iso_data(sources, budgets, "base_tokens")
    parabolas = timing_parabolas(data)
    _print_parabolas(parabolas, "d (tokens)")
    fit = fit_timing(data.source, parabolas)
    print_table(table_console(), *timing_table(fit))
    plot = _write_iso(output, "timing", data, parabolas, {"fit": asdict(fit), "paper": PAPER})
    plot_timing(data.points, parabolas, fit, plot)
    print_lines(table_console(), [f"Plot: {plot}"])


@fit_app.command()
def factor(sources: Sources, output: Output, budgets: Budgets = None) -> None:
    """Fit the growth factor: the g of the lowest loss at equal FLOPs."""
    from megagrow.fits.parabola import PAPER_BEST, factor_parabolas, fit_factor
    from megagrow.fits.plots import plot_factor
    from megagrow.fits.tables import factor_table

    data = _iso_data(sources, budgets, "factor")
    parabolas = factor_parabolas(data)
    _print_parabolas(parabolas, "g")
    fit = fit_factor(data, parabolas)
    print_table(table_console(), *factor_table(fit))
    plot = _write_iso(output, "factor", data, parabolas, {"fit": asdict(fit), "paper": PAPER_BEST})
    plot_factor(data.points, parabolas, fit, plot)
    print_lines(table_console(), [f"Plot: {plot}"])


@fit_app.command()
def scaling(
    sources: Sources,
    output: Output,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="C,C,...",
            help="FLOPs at which to report the saving. Default: the largest of the data, and 10x.",
        ),
    ] = None,
    floor: Annotated[
        bool, typer.Option("--floor/--no-floor", help="Fit the floor e, or fix it at 0.")
    ] = True,
) -> None:
    """Fit the FLOPs saved: L = a C^b + e from scratch and grown, extrapolated with a 95% band."""
    from megagrow.fits.data import find_csv, parse_budgets, read_scaling_csv
    from megagrow.fits.plots import plot_scaling
    from megagrow.fits.runs import scaling_points
    from megagrow.fits.scaling import default_budgets, fit_scaling, saving_at
    from megagrow.fits.tables import saving_table, scaling_lines, scaling_table

    console = table_console()
    csv = find_csv(sources)
    data = read_scaling_csv(csv) if csv else scaling_points(sources)
    print_lines(console, data.notes)
    laws = fit_scaling(data, floor)
    flops = parse_budgets(budgets) if budgets else default_budgets(laws)
    savings = [saving_at(*laws, budget) for budget in flops]
    lines = scaling_lines(laws, savings)
    print_table(console, *scaling_table(laws))
    print_table(console, *saving_table(savings))
    print_lines(console, lines)
    results = {"laws": [asdict(law) for law in laws], "savings": [asdict(one) for one in savings]}
    plot = _write(output, "scaling", results | {"notes": (*data.notes, *lines)})
    plot_scaling(data.points, laws, savings, plot)
    print_lines(console, [f"Plot: {plot}"])


def _iso_data(
    sources: Sequence[Path], budgets: str | None, choice: Literal["base_tokens", "factor"]
) -> "Data[IsoPoint]":
    """Read the points of runs at equal FLOPs from a CSV file or run directories; print notes."""
    from megagrow.fits.data import find_csv, parse_budgets, read_iso_csv
    from megagrow.fits.runs import iso_points

    csv = find_csv(sources)
    if csv is None and budgets is None:
        raise ConfigError(
            "--budgets is missing: the FLOPs at which to compare the runs, such as 1e17,2e17"
        )
    if csv is not None and budgets is not None:
        raise ConfigError(f"--budgets is for run directories: {csv} has its own column 'flops'")
    if budgets is not None:
        data = iso_points(sources, parse_budgets(budgets), choice)
    else:
        assert csv is not None
        data = read_iso_csv(csv, choice, lower_bound=0.0 if choice == "base_tokens" else 1.0)
    print_lines(table_console(), data.notes)
    return data


def _print_parabolas(parabolas: "Sequence[Parabola]", quantity: str) -> None:
    from megagrow.fits.tables import parabola_table, refusals

    console = table_console()
    print_table(console, *parabola_table(parabolas, quantity))
    print_lines(console, refusals(parabolas))


def _write_iso(
    output: Path,
    name: str,
    data: "Data[IsoPoint]",
    parabolas: "Sequence[Parabola]",
    results: dict[str, Any],
) -> Path:
    rows = [asdict(parabola) for parabola in parabolas]
    return _write(output, name, results | {"parabolas": rows, "notes": data.notes})


def _write(output: Path, name: str, results: dict[str, Any]) -> Path:
    """Write the JSON file; return the path of the plot."""
    path = output / f"{name}.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text(path, format_json(results))
    except OSError as error:
        raise unwritable(path, error) from error
    return path.with_suffix(".png")
