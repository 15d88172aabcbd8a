"""Validate a growth map against its two models before anything is transferred."""

from collections.abc import Mapping

import numpy as np

from megagrow.growth.map import Axis, Dense, Gather, GrowthMap, Term
from megagrow.parallel.sharding import ParamSpec

Plan = Mapping[str, ParamSpec]


def check_map(growth: GrowthMap, source: Plan, target: Plan) -> None:
    """Raise ValueError, naming the parameter, for an invalid growth map.

    A map is invalid if it omits a parameter or covers one twice, if a source does not exist, or if
    shapes do not fit.
    """
    for name, spec in target.items():
        if name not in growth.weights:
            raise ValueError(f"the growth map omits {name}")
        for term in (*growth.weights[name], *growth.moments.get(name, ())):
            _check_term(spec, term, source)
        _check_cover(spec, growth.weights[name], bool(growth.fills.get(name)))
        _check_twice(spec, growth.moments.get(name, ()))
        for fill in growth.fills.get(name, ()):
            for mask, size in ((fill.new_rows, spec.rows), (fill.new_cols, spec.cols)):
                if mask is not None and len(mask) != size:
                    raise ValueError(f"{name}: a fill for {len(mask)} entries of an axis of {size}")
    for table in (growth.weights, growth.moments, growth.fills):
        if unknown := sorted(table.keys() - target.keys()):
            raise ValueError(f"the growth map defines {unknown[0]}, which the target does not have")


def _check_term(spec: ParamSpec, term: Term, source: Plan) -> None:
    for origin in (*term.sources, *_gain(term)):
        if origin not in source:
            raise ValueError(f"{spec.name}: its source {origin} does not exist")
    first = source[term.sources[0]]
    if isinstance(term, Gather):
        _check_axis(spec.name, "rows", term.rows, first.rows, spec.rows)
        _check_axis(spec.name, "columns", term.cols, first.cols, spec.cols)
        return
    for origin in term.sources:
        if (source[origin].rows, source[origin].cols) != (first.rows, first.cols):
            raise ValueError(
                f"{spec.name} mixes {term.sources[0]} and {origin}, whose shapes differ"
            )
    if len(term.alphas) != len(term.sources):
        raise ValueError(f"{spec.name}: {len(term.alphas)} factors for {len(term.sources)} sources")
    _check_matrix(spec.name, "rows", term.left, first.rows, spec.rows)
    _check_matrix(spec.name, "columns", term.right, first.cols, spec.cols)
    for origin in _gain(term):
        if source[origin].rows != first.cols:
            raise ValueError(f"{spec.name}: the gain {origin} does not fit {term.sources[0]}")


def _gain(term: Term) -> tuple[str, ...]:
    return (term.gain,) if isinstance(term, Dense) and term.gain is not None else ()


def _check_axis(name: str, unit: str, axis: Axis, size: int, grown: int) -> None:
    if axis.index is None:
        if size != grown:
            raise ValueError(f"{name}: {size} {unit} become {grown}, but the axis has no index")
    elif len(axis.index) != grown:
        raise ValueError(f"{name} has {grown} {unit}, the growth map has {len(axis.index)}")
    elif not (axis.index < size).all() or not (axis.index >= -1).all():
        raise ValueError(f"{name}: the growth map reads {unit} outside of the source's {size}")
    if axis.scale is not None and len(axis.scale) != grown:
        raise ValueError(f"{name} has {grown} {unit}, but {len(axis.scale)} scales")


def _check_matrix(name: str, unit: str, matrix: np.ndarray | None, size: int, grown: int) -> None:
    shape = (size, size) if matrix is None else matrix.shape
    if shape != (grown, size):
        raise ValueError(f"{name}: a matrix {shape} for {size} {unit} that become {grown}")


def _check_cover(spec: ParamSpec, terms: tuple[Term, ...], filled: bool) -> None:
    _check_twice(spec, terms)
    covered = sum(_covered(spec, term) for term in terms)
    if covered < spec.rows * spec.cols and not filled:
        raise ValueError(
            f"the growth map covers only a part of {spec.name}: {covered} of "
            f"{spec.rows * spec.cols} entries come from the source, and the rest has no fill"
        )


def _check_twice(spec: ParamSpec, terms: tuple[Term, ...]) -> None:
    for index, one in enumerate(terms):
        for other in terms[:index]:
            pairs = zip(_masks(spec, one), _masks(spec, other), strict=True)
            if all((a & b).any() for a, b in pairs):
                raise ValueError(f"the growth map covers a range of {spec.name} twice")


def _covered(spec: ParamSpec, term: Term) -> int:
    rows, cols = _masks(spec, term)
    return int(rows.sum()) * int(cols.sum())


def _masks(spec: ParamSpec, term: Term) -> tuple[np.ndarray, np.ndarray]:
    """Return boolean masks of the target's rows and columns that a term covers."""
    axes = (term.rows, term.cols) if isinstance(term, Gather) else (Axis(), Axis())
    found = [
        np.ones(size, bool) if axis.index is None else axis.index >= 0
        for axis, size in zip(axes, (spec.rows, spec.cols), strict=True)
    ]
    return found[0], found[1]
