"""What `megagrow fit` reads: points, here out of a CSV file (`fit_runs`: out of finished runs)."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from megagrow.errors import ConfigError, DataError

RunKind = Literal["scratch", "grown"]


@dataclass(frozen=True, slots=True)
class IsoPoint:
    """The loss that one choice has reached at one size and budget."""

    parameters: float
    """N, of the grown model, outside its embeddings."""
    flops: float
    """C, the budget."""
    choice: float
    """Positive: d, the base's tokens, or g, the growth factor."""
    loss: float
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ScalingPoint:
    """The loss that a run from scratch, or one that grew, has reached with a budget."""

    kind: RunKind
    flops: float
    loss: float
    seed: int = 0


Point = TypeVar("Point", IsoPoint, ScalingPoint)


@dataclass(frozen=True, slots=True)
class Data(Generic[Point]):
    """Points, and what was left out of them."""

    source: str
    """Named in errors."""
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()


def csv_of(sources: Sequence[Path]) -> Path | None:
    """The CSV file, where `sources` is one; None where all are directories.

    Raises InputError for anything else.
    """
    if len(sources) == 1 and sources[0].is_file():
        return sources[0]
    for source in sources:
        if not source.is_dir():
            given = "is a file: give one CSV file, or" if source.is_file() else "is not there: give"
            raise ConfigError(f"{source}: {given} directories of finished runs")
    return None


def read_iso_csv(path: Path, column: str, least: float) -> Data[IsoPoint]:
    """The points of a CSV with columns parameters, flops, `column`, loss and perhaps seed.

    Rows whose choice is `least` or less have no place on the log axis (d = 0, training from
    scratch) or are no growth (g = 1): they are left out, with a note. Raises InputError, which
    names file, line and column.
    """
    points, out = [], 0
    for row in _rows(path, ("parameters", "flops", column, "loss")):
        point = IsoPoint(
            row.positive("parameters"),
            row.positive("flops"),
            row.not_negative(column),
            row.positive("loss"),
            row.seed(),
        )
        if point.choice > least:
            points.append(point)
        else:
            out += 1
    notes = [f"{out} points with {column} of {least:g} or less left out"] if out else []
    return Data(str(path), tuple(points), tuple(notes))


def read_scaling_csv(path: Path) -> Data[ScalingPoint]:
    """The points of a CSV with columns kind (scratch or grown), flops, loss and perhaps seed.

    Raises InputError, which names file, line and column.
    """
    points = [
        ScalingPoint(row.kind(), row.positive("flops"), row.positive("loss"), row.seed())
        for row in _rows(path, ("kind", "flops", "loss"))
    ]
    return Data(str(path), tuple(points))


def parse_budgets(text: str) -> tuple[float, ...]:
    """The FLOPs of `1e17,2e17`, sorted. Raises InputError."""
    found = set()
    for word in text.split(","):
        value = _number(word)
        if value is None or value <= 0:
            raise ConfigError(f"--budgets: {word.strip()!r} is no number of FLOPs; write 1e17,2e17")
        found.add(value)
    return tuple(sorted(found))


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of a CSV."""

    place: str
    cells: dict[str, str]

    def not_negative(self, column: str) -> float:
        text = self.cells[column]
        value = _number(text)
        if value is None:
            raise DataError(f"{self.place}, column '{column}': {text!r} is no finite number")
        if value < 0:
            raise DataError(f"{self.place}, column '{column}': {text} is negative")
        return value

    def positive(self, column: str) -> float:
        value = self.not_negative(column)
        if value == 0:
            raise DataError(f"{self.place}, column '{column}': 0 is not positive")
        return value

    def seed(self) -> int:
        text = self.cells.get("seed", "0")
        try:
            return int(text)
        except ValueError as error:
            what = f"{self.place}, column 'seed': {text!r} is no whole number"
            raise DataError(what) from error

    def kind(self) -> RunKind:
        text = self.cells["kind"].strip()
        if text == "scratch":
            return "scratch"
        if text == "grown":
            return "grown"
        raise DataError(f"{self.place}, column 'kind': {text!r} is neither scratch nor grown")


def _rows(path: Path, needed: Sequence[str]) -> list[_Row]:
    """The lines below the header; columns that are not asked for may stand there."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header, needed)
            rows = [_row(f"{path} line {reader.line_num}", header, cells) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is no CSV file that can be read ({error})") from error
    found = [row for row in rows if row.cells]
    if not found:
        raise DataError(f"{path}: no line below its header; give at least one point")
    return found


def _check_header(path: Path, header: Sequence[str], needed: Sequence[str]) -> None:
    for name in needed:
        if name not in header:
            raise DataError(
                f"{path} line 1: column '{name}' is missing; needed are {', '.join(needed)}"
            )
    for name in (*needed, "seed"):
        if header.count(name) > 1:
            raise DataError(f"{path} line 1: column '{name}' stands there twice")


def _row(place: str, header: Sequence[str], cells: Sequence[str]) -> _Row:
    if cells and len(cells) != len(header):
        raise DataError(f"{place}: {len(cells)} cells for {len(header)} columns")
    return _Row(place, dict(zip(header, cells, strict=False)))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
