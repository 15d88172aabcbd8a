"""Synthetic losses with known fits, as points and as CSV files."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np

from megagrow.fits.data import Data, IsoPoint, RunKind, ScalingPoint

PAPER = (0.88, 163.27, -5.74)
SIZES = (0.4e9, 1.1e9, 3e9)
BUDGETS = (1e20, 3e20, 1e21)
TIMINGS = tuple(10 ** (9 + 0.25 * step) for step in range(10))
BEND = 0.03
"""Increase of the loss, in nats, one decade away from the best choice."""


def best_tokens(size: float, flops: float, constants: Sequence[float] = PAPER) -> float:
    a, b, c = constants
    return 10 ** (a * math.log10(size) + b / math.log10(flops) + c)


def iso_loss(size: float, flops: float, choice: float, best: float) -> float:
    level = 1.7 + 400 * size**-0.34 + 60 * flops**-0.08
    return level + BEND * math.log10(choice / best) ** 2


def timing_points(
    *, noise: float = 0.0, seed: int = 0, sizes: Sequence[float] = SIZES,
    budgets: Sequence[float] = BUDGETS, timings: Sequence[float] = TIMINGS, repeats: int = 1,
    constants: Sequence[float] = PAPER,
) -> Data[IsoPoint]:  # fmt: skip
    draw = np.random.default_rng(seed)
    points = [
        IsoPoint(
            size, flops, d,
            iso_loss(size, flops, d, best_tokens(size, flops, constants)) + noise * draw.normal(),
            repeat,
        )
        for repeat in range(repeats) for size in sizes for flops in budgets for d in timings
    ]  # fmt: skip
    return Data("made", tuple(points))


def factor_points(
    best: float, *, noise: float = 0.0, seed: int = 0, factors: Sequence[float] = (2, 3, 4, 8, 16)
) -> Data[IsoPoint]:
    draw = np.random.default_rng(seed)
    points = [
        IsoPoint(size, flops, g, iso_loss(size, flops, g, best) + noise * draw.normal())
        for size in SIZES for flops in BUDGETS for g in factors
    ]  # fmt: skip
    return Data("made", tuple(points))


SCRATCH_LAW, GROWN_LAW = (1600.0, -0.16, 1.7), (1500.0, -0.16, 1.7)
SCALING_BUDGETS = tuple(float(c) for c in np.geomspace(1e17, 1e21, 9))


def scaling_points(
    *, noise: float = 0.0, seed: int = 0, floor: bool = True, repeats: int = 1,
    budgets: Sequence[float] = SCALING_BUDGETS,
) -> Data[ScalingPoint]:  # fmt: skip
    draw = np.random.default_rng(seed)
    laws: tuple[tuple[RunKind, tuple[float, float, float]], ...]
    laws = (("scratch", SCRATCH_LAW), ("grown", GROWN_LAW))
    points = [
        ScalingPoint(kind, c, a * c**b + (e if floor else 0.0) + noise * draw.normal(), repeat)
        for kind, (a, b, e) in laws for c in budgets for repeat in range(repeats)
    ]  # fmt: skip
    return Data("made", tuple(points))


def write_csv(path: Path, header: str, points: Iterable[IsoPoint | ScalingPoint]) -> Path:
    """Write a CSV file with the points' fields, in order, under `header`."""
    lines = [header, *(",".join(map(str, astuple(point))) for point in points)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


ISO_HEADER = "parameters,flops,{},loss,seed"
SCALING_HEADER = "kind,flops,loss,seed"
