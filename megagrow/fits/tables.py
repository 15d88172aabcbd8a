"""Tables and closing lines of `megagrow fit`."""

from collections.abc import Sequence

from rich.table import Table

from megagrow.fits.factor import PAPER_BEST, FactorFit
from megagrow.fits.least_squares import Constant
from megagrow.fits.parabola import Parabola, accepted
from megagrow.fits.scaling import FlopSaving, PowerLaw
from megagrow.fits.timing import PAPER, TimingFit


def parabola_table(parabolas: Sequence[Parabola], what: str) -> Table:
    """The best `what`, with its unit in brackets, at each size and budget."""
    table = Table("N", "C (FLOPs)", "points", f"best {what}", "-/+ 1 standard error")
    for one in parabolas:
        head = f"{one.parameters:.4g}", f"{one.flops:.4g}", str(one.points)
        if one.best is None:
            table.add_row(*head, "-", f"refused: {one.refused}")
        else:
            table.add_row(*head, f"{one.best:.4g}", _one_error(one.best, one.standard_error))
    return table


def _one_error(best: float, error: float | None) -> str:
    if error is None:
        return "not known: no point to spare"
    return f"{best / 10**error:.4g} to {best * 10**error:.4g}"


def refusals(parabolas: Sequence[Parabola]) -> list[str]:
    """How many parabolas were of no use."""
    out = len(parabolas) - len(accepted(parabolas))
    return [f"{out} of {len(parabolas)} parabolas refused, not in the fit."] if out else []


def timing_table(fit: TimingFit) -> Table:
    """The constants of log10 d = a log10 N + b / log10 C + c, the paper's beside them."""
    table = Table("log10 d = a log10 N + b / log10 C + c", "fit", "95% interval", "paper")
    for name, constant in (("a", fit.a), ("b", fit.b), ("c", fit.c)):
        table.add_row(name, f"{constant.value:.4g}", interval_text(constant), f"{PAPER[name]:g}")
    return table


def factor_table(fit: FactorFit) -> Table:
    """The recommended growth factor, the paper's beside it."""
    table = Table("", "fit", "95% interval", "nearest tried", "paper")
    interval = "not known" if fit.low is None else f"{fit.low:.3g} to {fit.high:.3g}"
    paper = "{:g} to {:g}".format(*PAPER_BEST)
    table.add_row("best g", f"{fit.factor:.3g}", interval, f"{fit.nearest_tried:g}", paper)
    return table


def scaling_table(laws: Sequence[PowerLaw]) -> Table:
    """The constants of L = a C^b + e."""
    table = Table("L = a C^b + e", "a", "b", "e (nats)", "points", "C of the points")
    for law in laws:
        constants = (f"{c.value:.4g} ({interval_text(c)})" for c in (law.a, law.b))
        floor = f"{law.e.value:.4g} ({interval_text(law.e)})" if len(law.theta) > 2 else "0, fixed"
        low, high = law.flops
        table.add_row(law.kind, *constants, floor, str(law.points), f"{low:.3g} to {high:.3g}")
    return table


def saving_table(savings: Sequence[FlopSaving]) -> Table:
    """What growing saves at each budget."""
    table = Table(
        "C (FLOPs, grown)", "loss", "scratch FLOPs for it", "saving", "95% band", "beyond the data"
    )
    for one in savings:
        head = f"{one.flops:.4g}", f"{one.loss:.4f}"
        if one.saving is None or one.scratch_flops is None:
            table.add_row(*head, "never: its floor is higher", "-", "-", _beyond(one))
            continue
        band = "not known" if one.low is None else f"{one.low:+.1%} to {one.high:+.1%}"
        cells = f"{one.scratch_flops:.4g}", f"{one.saving:+.1%}", band
        table.add_row(*head, *cells, _beyond(one))
    return table


def _beyond(saving: FlopSaving) -> str:
    told = (("grown", saving.beyond_grown), ("scratch", saving.beyond_scratch))
    far = [f"{kind} {times:.3g}x" for kind, times in told if times is not None and times > 1.0001]
    return ", ".join(far) or "no"


def scaling_lines(laws: Sequence[PowerLaw], savings: Sequence[FlopSaving]) -> list[str]:
    """What is to be said of the fit."""
    lines = [
        f"{law.kind}: e = {law.e.value:.3g} is below 0, no floor was found; compare --no-floor."
        for law in laws
        if law.e.value < 0
    ]
    far = [one for one in savings if _beyond(one) != "no"]
    if far:
        most = max(max(one.beyond_grown, one.beyond_scratch or 0.0) for one in far)
        lines.append(
            f"Extrapolated up to {most:.3g} times beyond the data: the bands hold only if the "
            "power law does."
        )
    return lines


def interval_text(constant: Constant) -> str:
    """`low to high`."""
    if constant.low is None:
        return "not known: no point to spare"
    return f"{constant.low:.4g} to {constant.high:.4g}"
