"""Tables and summary lines of `megagrow fit`."""

from collections.abc import Sequence

from megagrow.fits.least_squares import Constant
from megagrow.fits.parabola import PAPER_BEST, FactorFit, Parabola, accepted
from megagrow.fits.scaling import FlopSaving, PowerLaw
from megagrow.fits.timing import PAPER, TimingFit

Columns = tuple[str, ...]
FitRows = list[tuple[str, ...]]
"""Cells of a table for `common.tables.print_table`."""

UNKNOWN = "unknown: no degrees of freedom"


def parabola_table(parabolas: Sequence[Parabola], choice: str) -> tuple[Columns, FitRows]:
    """Return a table of the best choice at each size and budget.

    `choice` is the column's name with its unit in brackets, such as `d (tokens)`.
    """
    columns = ("N", "C (FLOPs)", "points", f"best {choice}", "-/+ 1 standard error")
    rows: FitRows = []
    for parabola in parabolas:
        head = f"{parabola.parameters:.4g}", f"{parabola.flops:.4g}", str(parabola.points)
        if parabola.best is None:
            rows.append((*head, "-", f"refused: {parabola.refused}"))
        else:
            error = _error_text(parabola.best, parabola.standard_error)
            rows.append((*head, f"{parabola.best:.4g}", error))
    return columns, rows


def _error_text(best: float, error: float | None) -> str:
    if error is None:
        return UNKNOWN
    return f"{best / 10**error:.4g} to {best * 10**error:.4g}"


def refusals(parabolas: Sequence[Parabola]) -> list[str]:
    """Return a line with the number of refused parabolas, or no line if there are none."""
    refused = len(parabolas) - len(accepted(parabolas))
    if not refused:
        return []
    return [f"{refused} of {len(parabolas)} parabolas refused and excluded from the fit."]


def timing_table(fit: TimingFit) -> tuple[Columns, FitRows]:
    """Return a table of the constants of log10 d = a log10 N + b / log10 C + c and the paper's."""
    columns = ("log10 d = a log10 N + b / log10 C + c", "fit", "95% interval", "paper")
    rows: FitRows = []
    for name, constant in (("a", fit.a), ("b", fit.b), ("c", fit.c)):
        rows.append((name, f"{constant.value:.4g}", interval_text(constant), f"{PAPER[name]:g}"))
    return columns, rows


def factor_table(fit: FactorFit) -> tuple[Columns, FitRows]:
    """Return a table of the recommended growth factor and the paper's."""
    columns = ("", "fit", "95% interval", "nearest tried", "paper")
    rows: FitRows = []
    interval = "unknown" if fit.low is None else f"{fit.low:.3g} to {fit.high:.3g}"
    paper = "{:g} to {:g}".format(*PAPER_BEST)
    rows.append(("best g", f"{fit.factor:.3g}", interval, f"{fit.nearest_tried:g}", paper))
    return columns, rows


def scaling_table(laws: Sequence[PowerLaw]) -> tuple[Columns, FitRows]:
    """Return a table of the constants of L = a C^b + e."""
    columns = ("L = a C^b + e", "a", "b", "e (nats)", "points", "C of the points")
    rows: FitRows = []
    for law in laws:
        constants = (f"{c.value:.4g} ({interval_text(c)})" for c in (law.a, law.b))
        floor = f"{law.e.value:.4g} ({interval_text(law.e)})" if len(law.theta) > 2 else "0, fixed"
        low, high = law.flops
        rows.append((law.kind, *constants, floor, str(law.points), f"{low:.3g} to {high:.3g}"))
    return columns, rows


def saving_table(savings: Sequence[FlopSaving]) -> tuple[Columns, FitRows]:
    """Return a table of the saving of growth at each budget."""
    columns = ("C (FLOPs, grown)", "loss", "scratch FLOPs", "saving", "95% band", "extrapolation")
    rows: FitRows = []
    for saving in savings:
        head = f"{saving.flops:.4g}", f"{saving.loss:.4f}"
        if saving.saving is None or saving.scratch_flops is None:
            rows.append((*head, "never: its floor is higher", "-", "-", _extrapolation(saving)))
            continue
        band = "unknown" if saving.low is None else f"{saving.low:+.1%} to {saving.high:+.1%}"
        cells = f"{saving.scratch_flops:.4g}", f"{saving.saving:+.1%}", band
        rows.append((*head, *cells, _extrapolation(saving)))
    return columns, rows


def _extrapolation(saving: FlopSaving) -> str:
    factors = (("grown", saving.beyond_grown), ("scratch", saving.beyond_scratch))
    beyond = [f"{kind} {x:.3g}x" for kind, x in factors if x is not None and x > 1.0001]
    return ", ".join(beyond) or "no"


def scaling_lines(laws: Sequence[PowerLaw], savings: Sequence[FlopSaving]) -> list[str]:
    """Return warnings about the fit: negative floors and extrapolation."""
    lines = [
        f"{law.kind}: the fitted floor e = {law.e.value:.3g} is negative; compare with --no-floor."
        for law in laws
        if law.e.value < 0
    ]
    extrapolated = [saving for saving in savings if _extrapolation(saving) != "no"]
    if extrapolated:
        largest = max(max(s.beyond_grown, s.beyond_scratch or 0.0) for s in extrapolated)
        lines.append(
            f"Extrapolated up to {largest:.3g} times beyond the data: the bands hold only if the "
            "power law does."
        )
    return lines


def interval_text(constant: Constant) -> str:
    """Format the interval of a constant as `low to high`."""
    if constant.low is None:
        return UNKNOWN
    return f"{constant.low:.4g} to {constant.high:.4g}"
