"""LiGO (Wang et al. 2023), the paper's G_learn: a growth map with learnable parameters.

Every parameter of the target is W' = B (sum over j of D[l, j] W_j) A^T (Du et al. 2024, eq. 37 to
42). D mixes the layers of the source, one matrix per type of tensor. B widens an activation axis
for all tensors that produce it, A for all that consume it. As in the paper, all axes of the
residual stream share one B, and gains follow it. Two differences let training start from a map
that preserves the function: A is a separate matrix instead of a copy of B, and axes of heads mix
complete heads, which commutes with rotary positions.

B is initialized to the lift of `direct_width` and A to its left inverse. D is initialized to
`zero_depth`: layer l copies its source layer, and new layers write zeros to the residual stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megagrow.growth.build_map import GrowthSpec, assemble
from megagrow.growth.depth import Depth, same_depth
from megagrow.growth.lifts import Lift
from megagrow.growth.map import Dense, Fill, Gather, GrowthMap, Term
from megagrow.model.layers.base import ActivationAxis, AxisRole
from megagrow.parallel.sharding import ParamSpec, parameter_plan


class Mixer(NamedTuple):
    """Matrix that widens one axis: (matrix kron identity of size `block`), on blocks of entries."""

    matrix: Tensor
    """(new blocks, old blocks)"""
    block: int

    def on_rows(self, weight: Tensor, rows: range) -> Tensor:
        """Return some rows of a widened matrix; `weight` is (old rows, columns)."""
        matrix = self.matrix[rows.start // self.block : rows.stop // self.block]
        blocks = weight.reshape(self.matrix.shape[1], -1)
        return (matrix @ blocks).reshape(len(rows), weight.shape[1])


class Recipe(NamedTuple):
    """Sources and matrices of one parameter of the target."""

    sources: tuple[str, ...]
    alphas: Tensor
    """Factor of each source: (len(sources),)."""
    rows: Mixer | None
    cols: Mixer | None
    """None: the axis is unchanged."""


@dataclass(frozen=True, eq=False)
class LigoParameters:
    """Learnable parameters of a growth map, only of growing axes; fp32, equal on all ranks."""

    growth: GrowthSpec
    depth: dict[str, Tensor]
    """Name within a layer -> (target layers, source layers). Only layers of one type are mixed."""
    produces: dict[str, Tensor]
    """Activation axis -> B, (new size, old size), in blocks of `ActivationAxis.block` entries."""
    consumes: dict[str, Tensor]
    """Activation axis -> A, of the same shape."""

    def tensors(self) -> list[Tensor]:
        """Return all tensors in a fixed order."""
        return [*self.depth.values(), *self.produces.values(), *self.consumes.values()]

    def recipe(self, spec: ParamSpec) -> Recipe:
        """Return the recipe of a parameter, differentiable in the learnable parameters."""
        cols = spec.col_role
        mixers = self._mixer(spec.row_role), None if cols is None else self._mixer(cols)
        if spec.layer is None or spec.name_in_layer not in self.depth:
            return Recipe((spec.name,), self.tensors()[0].new_ones(1), *mixers)
        source, kind = self.growth.source, self.growth.target.layer_type(spec.layer)
        mixed = [j for j in range(source.num_hidden_layers) if source.layer_type(j) == kind]
        alphas = self.depth[spec.name_in_layer][spec.layer, mixed]
        return Recipe(tuple(map(spec.of_layer, mixed)), alphas, *mixers)

    def _mixer(self, role: AxisRole) -> Mixer | None:
        axis, side = role
        matrices = self.consumes if side == "consumes" else self.produces
        matrix = matrices.get(axis.name)
        if matrix is None:
            return None
        if side == "tied gain":
            # The tied head reads repeated entries unscaled: the final norm divides by the copies.
            share = torch.from_numpy(self.growth.width.lifts[axis.name].share).to(matrix)
            matrix = matrix * share[:, None]
        return Mixer(matrix, _block(axis, self.growth))


def _block(axis: ActivationAxis, growth: GrowthSpec) -> int:
    """Return the number of entries of an axis that are mixed as a unit."""
    return 1 if axis.block is None else int(getattr(growth.source, axis.block))


def initial(
    growth: GrowthSpec, device: torch.device, dtype: torch.dtype = torch.float32
) -> LigoParameters:
    """Return the initial learnable parameters: the growth is exact.

    `growth` must be that of `learn_depth`, `learn_width` or both, to a larger model
    (`learning_problems`).
    """

    def trained(values: Tensor) -> Tensor:
        return values.to(device, dtype).requires_grad_()

    produces: dict[str, Tensor] = {}
    consumes: dict[str, Tensor] = {}
    depth: dict[str, Tensor] = {}
    deeper = growth.depth.layers != same_depth(growth.source).layers
    for spec in parameter_plan(growth.target, tp=1).values():
        if deeper and spec.layer is not None and spec.name_in_layer not in depth:
            size = growth.source.num_hidden_layers
            depth[spec.name_in_layer] = trained(_initial_depth(spec, growth.depth, size))
        for role in (spec.row_role, spec.col_role):
            if role is None or growth.width.lifts[role.axis.name].unchanged:
                continue
            name = role.axis.name
            into = consumes if role.side == "consumes" else produces
            if name not in into:
                lift, block = growth.width.lifts[name], _block(role.axis, growth)
                into[name] = trained(_initial_width(lift, block, into is consumes))
    return LigoParameters(growth, depth, produces, consumes)


def _initial_depth(spec: ParamSpec, depth: Depth, size: int) -> Tensor:
    """Return D: (target layers, source layers)."""
    matrix = torch.zeros(len(depth.layers), size)
    for row, layer in zip(matrix, depth.layers, strict=True):
        if layer.source is not None and not (layer.silent and spec.silences):
            row[layer.source] = 1.0
    return matrix


def _initial_width(lift: Lift, block: int, consumes: bool) -> Tensor:
    """Return B, or A = (B^+)^T."""
    matrix = torch.zeros(lift.grown_size // block, lift.size // block, dtype=torch.float64)
    factor = lift.share / lift.produce if consumes else lift.produce
    for row in range(len(matrix)):
        matrix[row, lift.index[row * block] // block] = factor[row * block]
    return matrix


def grown_slice(spec: ParamSpec, recipe: Recipe, mixed: Tensor, tp: int, tp_rank: int) -> Tensor:
    """Return a rank's tensor-parallel slice of a parameter of the target.

    `mixed` is the mixture of its sources (rows, cols); the result has its dtype. Padding of the
    vocabulary is zero. A vector is (rows,).
    """
    shape = spec.slice_shape(tp)
    rows, cols = (
        range(first, min(first + count, size))
        for first, count, size in zip(
            spec.slice_origin(tp, tp_rank), shape, (spec.rows, spec.cols), strict=True
        )
    )
    if spec.tp_dim == 1:  # slice first: the second product is smaller
        weight = _lifted(recipe.rows, rows, _lifted(recipe.cols, cols, mixed.T).T)
    else:
        weight = _lifted(recipe.cols, cols, _lifted(recipe.rows, rows, mixed).T).T
    if len(rows) < shape[0]:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, shape[0] - len(rows)))
    return weight.squeeze(1) if spec.is_vector else weight


def _lifted(mixer: Mixer | None, rows: range, weight: Tensor) -> Tensor:
    return weight[rows.start : rows.stop] if mixer is None else mixer.on_rows(weight, rows)


def forming_flops(learned: LigoParameters, specs: Sequence[ParamSpec]) -> int:
    """Return the FLOPs that compute the given parameters of the target once, unsharded."""
    total = 0
    for spec in specs:
        recipe = learned.recipe(spec)
        rows, cols = (
            size if mixer is None else mixer.block * mixer.matrix.shape[1]
            for mixer, size in ((recipe.rows, spec.rows), (recipe.cols, spec.cols))
        )
        if len(recipe.sources) > 1:
            total += 2 * len(recipe.sources) * rows * cols
        if recipe.rows is not None:
            total += 2 * spec.rows * recipe.rows.matrix.shape[1] * cols
        if recipe.cols is not None:
            total += 2 * spec.cols * recipe.cols.matrix.shape[1] * spec.rows
    return total


def learned_map(learned: LigoParameters) -> GrowthMap:
    """Return the map of the current learnable parameters; it does not preserve the function.

    Moments follow the state policy. With `transport` those of an old layer come from its initial
    source layer, along each axis by the law of lifts with the learned matrices: gradients are
    (B^+)^T g A^+ (docs/reference/operators.md).
    """
    growth = learned.growth
    weights: dict[str, tuple[Term, ...]] = {}
    moments: dict[str, tuple[Term, ...]] = {}
    fills: dict[str, tuple[Fill, ...]] = {}
    start = assemble(growth)
    matrices: dict[AxisRole | None, _Matrices] = {None: (None, None)}
    for name, spec in parameter_plan(growth.target, tp=1).items():
        recipe = learned.recipe(spec)
        roles = spec.row_role, spec.col_role
        for role, mixer in zip(roles, (recipe.rows, recipe.cols), strict=True):
            if role not in matrices:
                matrices[role] = _matrices(mixer, law="exp_avg" in start.kinds)
        (left, left_law), (right, right_law) = (matrices[role] for role in roles)
        alphas = recipe.alphas.tolist()
        weights[name] = _term(dict(zip(recipe.sources, alphas, strict=True)), left, right)
        moments[name] = _term(_moment_source(learned, spec), left_law, right_law)
        if not weights[name]:
            fills[name] = (Fill(f"{growth.stream}/{name}"),)
    return replace(
        start,
        weights=weights,
        moments=moments,
        fills=fills,
        preserves_function=False,
        scales={},
    )


_Matrices = tuple[np.ndarray | None, np.ndarray | None]
"""Matrices that lift one axis of weights, and of their gradients."""


def _matrices(mixer: Mixer | None, law: bool) -> _Matrices:
    if mixer is None:
        return None, None
    small = mixer.matrix.detach().double().cpu().numpy()
    identity = np.eye(mixer.block)
    # (B^+)^T, as the columns of B are independent.
    lawful = np.linalg.solve(small.T @ small, small.T).T if law else small
    return np.kron(small, identity), np.kron(lawful, identity)


def _moment_source(learned: LigoParameters, spec: ParamSpec) -> dict[str, float]:
    """Return the parameter whose moments are transferred, if there is one."""
    if spec.layer is None:
        return {spec.name: 1.0}
    layer = learned.growth.depth.layers[spec.layer]
    if layer.fresh or layer.source is None:
        return {}
    return {spec.of_layer(layer.source): 1.0}


def _term(
    alphas: dict[str, float], left: np.ndarray | None, right: np.ndarray | None
) -> tuple[Term, ...]:
    used = {name: alpha for name, alpha in alphas.items() if alpha}
    if left is None and right is None and list(used.values()) == [1.0]:
        return (Gather(next(iter(used))),)
    return (Dense(tuple(used), tuple(used.values()), left, right),) if used else ()
