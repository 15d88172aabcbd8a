"""Reference implementation of growth maps: matrix products of full tensors.

A gather becomes two matrices of zeros and scales, so that this code shares no indexing with the
code that is compared with it.
"""

import numpy as np
import torch
from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.growth.map import Axis, Dense, Fill, Gather, GrowthMap
from megagrow.parallel.optimizers.rules import ADAMW, UpdateRule
from megagrow.parallel.sharding import ParamSpec, StateKind, parameter_plan
from megagrow.reshard.fill import initial_values, normal

State = dict[str, dict[str, Tensor]]
"""Parameter -> kind of state -> full logical tensor (rows, cols)."""


def grown(
    state: State,
    growth: GrowthMap,
    target: ModelConfig,
    kinds: tuple[StateKind, ...] | None = None,
    matrices: UpdateRule = ADAMW,
) -> State:
    """Return the state of the target, or some kinds of it, in the dtype of the source.

    `matrices` is the optimizer of the matrices of decoder layers. Differentiable with respect to
    the source's state.
    """
    return {
        name: {kind: _made(state, growth, spec, kind) for kind in kinds or spec.kinds}
        for name, spec in parameter_plan(target, 1, matrices).items()
    }


def _made(state: State, growth: GrowthMap, spec: ParamSpec, kind: StateKind) -> Tensor:
    like = next(iter(next(iter(state.values())).values()))
    total = like.new_zeros(spec.rows, spec.cols)
    if kind == "fp32":
        for fill in growth.fills.get(spec.name, ()):
            total = total + filled(fill, spec.rows, spec.cols).to(like)
    for term in growth.terms(spec.name, kind):
        total = total + (
            _gathered(state[term.source][kind], term)
            if isinstance(term, Gather)
            else _mixed(state, term, kind)
        )
    return total


def _gathered(source: Tensor, term: Gather) -> Tensor:
    rows, cols = (
        _matrix(axis, size).to(source)
        for axis, size in zip((term.rows, term.cols), source.shape, strict=True)
    )
    return rows @ source @ cols.T


def _matrix(axis: Axis, size: int) -> Tensor:
    """Return the (target, source) matrix of an axis."""
    index = np.arange(size) if axis.index is None else axis.index
    matrix = torch.zeros(len(index), size, dtype=torch.float64)
    for i, origin in enumerate(index.tolist()):
        if origin >= 0:
            matrix[i, origin] = 1.0 if axis.scale is None else axis.scale[i]
    return matrix


def _mixed(state: State, term: Dense, kind: str) -> Tensor:
    pairs = zip(term.alphas, term.sources, strict=True)
    total = sum(alpha * state[name][kind] for alpha, name in pairs)
    if term.gain is not None:
        total = total * state[term.gain]["fp32"].ravel() ** term.gain_power
    if term.left is not None:
        total = torch.from_numpy(term.left).to(total) @ total
    return total if term.right is None else total @ torch.from_numpy(term.right).to(total).T


def filled(fill: Fill, rows: int, cols: int) -> Tensor:
    """Return the values of a fill, (rows, cols) fp64."""
    noise = normal(fill.stream, 0, rows * cols).view(rows, cols).double()
    new_rows = _mask(fill.new_rows, rows)
    new_cols = _mask(fill.new_cols, cols)
    std = torch.tensor(fill.std, dtype=torch.float64)[new_rows[:, None].long(), new_cols.long()]
    if fill.center is not None:
        labels = torch.from_numpy(fill.center)
        same = (labels[:, None] == labels).double()
        noise = noise - noise @ (same / same.sum(0))
    if fill.basis is not None:
        basis = torch.from_numpy(fill.basis)
        noise = noise - noise @ basis @ basis.T
    initial = initial_values(fill.initial, fill.stream, range(rows), cols).double()
    return noise * std + initial * new_rows[:, None]


def _mask(mask: np.ndarray | None, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bool) if mask is None else torch.from_numpy(mask)
