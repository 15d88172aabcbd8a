"""Data points of `megagrow fit` and their CSV reader; `fits.runs` reads them from finished runs."""

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
    """Loss of one choice of d or g at one model size and FLOP budget (IsoFLOP)."""

    parameters: float
    """N, non-embedding parameters of the grown model."""
    flops: float
    """C, the budget."""
    choice: float
    """d, training tokens of the base, or g, the growth factor; positive."""
    loss: float
    """Nats per token."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ScalingPoint:
    """Final loss of a run from scratch or of a grown run at one FLOP budget."""

    kind: RunKind
    flops: float
    """C, base included."""
    loss: float
    """Nats per token."""
    seed: int = 0


Point = TypeVar("Point", IsoPoint, ScalingPoint)


@dataclass(frozen=True, slots=True)
class Data(Generic[Point]):
    """Points and notes about excluded data."""

    source: str
    """File or directories, for error messages."""
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()
    """Messages about excluded points."""


def find_csv(sources: Sequence[Path]) -> Path | None:
    """Return the CSV file if `sources` is a single file, or None if all are directories.

    Raises InputError for anything else.
    """
    if len(sources) == 1 and sources[0].is_file():
        return sources[0]
    for source in sources:
        if not source.is_dir():
            if source.is_file():
                raise DataError(
                    f"{source} is a file: pass either one CSV file or directories of finished runs"
                )
            raise DataError(f"{source} does not exist: pass directories of finished runs")
    return None


def read_iso_csv(path: Path, column: str, lower_bound: float) -> Data[IsoPoint]:
    """Read a CSV file with columns parameters, flops, `column`, loss and optionally seed.

    Rows whose choice is not above `lower_bound` are excluded with a note: d = 0 (training from
    scratch) has no logarithm, and g = 1 is no growth. Raises InputError with file, line and column.
    """
    points, excluded = [], 0
    for row in _rows(path, ("parameters", "flops", column, "loss")):
        point = IsoPoint(
            row.positive("parameters"),
            row.positive("flops"),
            row.non_negative(column),
            row.positive("loss"),
            row.seed(),
        )
        if point.choice > lower_bound:
            points.append(point)
        else:
            excluded += 1
    notes = [f"{excluded} points with {column} <= {lower_bound:g} excluded"] if excluded else []
    return Data(str(path), tuple(points), tuple(notes))


def read_scaling_csv(path: Path) -> Data[ScalingPoint]:
    """Read a CSV file with columns kind (scratch or grown), flops, loss and optionally seed.

    Raises InputError with file, line and column.
    """
    points = [
        ScalingPoint(row.kind(), row.positive("flops"), row.positive("loss"), row.seed())
        for row in _rows(path, ("kind", "flops", "loss"))
    ]
    return Data(str(path), tuple(points))


def parse_budgets(text: str) -> tuple[float, ...]:
    """Parse a list of FLOPs such as `1e17,2e17` and return it sorted, without duplicates.

    Raises InputError if an entry is not a positive number.
    """
    budgets = set()
    for word in text.split(","):
        value = _number(word)
        if value is None or value <= 0:
            raise ConfigError(
                f"--budgets: {word.strip()!r} is not a positive number of FLOPs; use a list such "
                "as 1e17,2e17"
            )
        budgets.add(value)
    return tuple(sorted(budgets))


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of a CSV file."""

    place: str
    """File and line number, for error messages."""
    cells: dict[str, str]
    """Cells by column name."""

    def non_negative(self, column: str) -> float:
        text = self.cells[column]
        value = _number(text)
        if value is None:
            raise DataError(f"{self.place}, column '{column}': {text!r} is not a finite number")
        if value < 0:
            raise DataError(f"{self.place}, column '{column}': {text} is negative")
        return value

    def positive(self, column: str) -> float:
        value = self.non_negative(column)
        if value == 0:
            raise DataError(f"{self.place}, column '{column}': 0 is not positive")
        return value

    def seed(self) -> int:
        text = self.cells.get("seed", "0")
        try:
            return int(text)
        except ValueError as error:
            message = f"{self.place}, column 'seed': {text!r} is not an integer"
            raise DataError(message) from error

    def kind(self) -> RunKind:
        text = self.cells["kind"].strip()
        if text == "scratch":
            return "scratch"
        if text == "grown":
            return "grown"
        raise DataError(f"{self.place}, column 'kind': {text!r} is neither scratch nor grown")


def _rows(path: Path, required: Sequence[str]) -> list[_Row]:
    """Read the non-empty lines below the header; additional columns are ignored."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header, required)
            rows = [_row(f"{path} line {reader.line_num}", header, cells) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV file ({error})") from error
    rows = [row for row in rows if row.cells]
    if not rows:
        raise DataError(f"{path}: no lines below the header; at least one point is required")
    return rows


def _check_header(path: Path, header: Sequence[str], required: Sequence[str]) -> None:
    for name in required:
        if name not in header:
            raise DataError(
                f"{path} line 1: column '{name}' is missing; required columns: "
                f"{', '.join(required)}"
            )
    for name in (*required, "seed"):
        if header.count(name) > 1:
            raise DataError(f"{path} line 1: column '{name}' is duplicated")


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
