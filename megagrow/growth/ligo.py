"""LiGO (Wang et al. 2023), the paper's G_learn: a growth whose own numbers are trained.

Every parameter of the target is W' = B (sum over j of D[l, j] W_j) A^T (Du et al. 2024, eq. 37 to
42): D mixes the layers of the source, one for each type of tensor; B makes a wire larger for all
tensors that produce it, A for all that consume it. As in the paper all axes of the residual stream
share one B, and gains follow it. Two things differ, so that training can begin at a point that
computes exactly what the source computes: A is no copy of B but a matrix of its own,
and wires of heads mix whole heads, which commutes with rotary positions.

B begins as the lift of `direct_width` and A as its left inverse; D begins as `zero_depth`: layer l
is a copy of the one that it stands for, and what new layers write to the residual stream is zero.
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
from megagrow.growth.tensor_axes import LAST_PROJECTIONS, AxisRole, leaf, strands
from megagrow.growth.width import Wire
from megagrow.parallel.sharding import ParamSpec, parameter_plan

_BY_HEADS: tuple[Wire, ...] = ("query", "key", "value", "mixed")


class Mixer(NamedTuple):
    """What makes one axis larger: (matrix kron identity of size `block`), on blocks of entries."""

    matrix: Tensor
    """(new blocks, old blocks)"""
    block: int

    def on_rows(self, weight: Tensor, rows: range) -> Tensor:
        """Some rows of what becomes of a matrix (old rows, columns)."""
        matrix = self.matrix[rows.start // self.block : rows.stop // self.block]
        blocks = weight.reshape(self.matrix.shape[1], -1)
        return (matrix @ blocks).reshape(len(rows), weight.shape[1])


class Recipe(NamedTuple):
    """What one parameter of the target is made of."""

    sources: tuple[str, ...]
    alphas: Tensor
    """Of each source its factor: (len(sources),)."""
    rows: Mixer | None
    cols: Mixer | None
    """None: the axis as it is."""


@dataclass(frozen=True, eq=False)
class Learned:
    """The numbers that are trained: only of what grows; fp32, and the same on all ranks."""

    growing: GrowthSpec
    depth: dict[str, Tensor]
    """Type of tensor, such as `q_proj` -> (target layers, source layers)."""
    produces: dict[Wire, Tensor]
    """Wire -> B, (new size, old size); counted in heads where the wire is made of heads."""
    consumes: dict[Wire, Tensor]
    """Wire -> A, of the same shape."""

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return [*self.depth.values(), *self.produces.values(), *self.consumes.values()]

    def recipe(self, spec: ParamSpec) -> Recipe:
        """How a parameter of the target is made; differentiable in the learned numbers."""
        rows, cols = strands(spec, self.growing.target.tie_word_embeddings)
        mixers = self._mixer(rows), None if cols is None else self._mixer(cols)
        if spec.layer is None or leaf(spec) not in self.depth:
            return Recipe((spec.name,), self.tensors()[0].new_ones(1), *mixers)
        count = self.growing.source.num_hidden_layers
        names = (spec.name.replace(f".{spec.layer}.", f".{j}.", 1) for j in range(count))
        return Recipe(tuple(names), self.depth[leaf(spec)][spec.layer], *mixers)

    def _mixer(self, strand: AxisRole) -> Mixer | None:
        wire, side = strand
        matrices = self.consumes if side == "consumes" else self.produces
        matrix = matrices.get(wire)
        if matrix is None:
            return None
        if side == "tied gain":
            # The head is the embedding: the final norm has to share out what that repeats.
            share = torch.from_numpy(self.growing.width.wires[wire].share).to(matrix)
            matrix = matrix * share[:, None]
        return Mixer(matrix, _block(wire, self.growing))


def _block(wire: Wire, growing: GrowthSpec) -> int:
    """How many entries of a wire are mixed as one."""
    return growing.source.head_dim if wire in _BY_HEADS else 1


def initial(
    growing: GrowthSpec, device: torch.device, dtype: torch.dtype = torch.float32
) -> Learned:
    """The learned numbers before they are trained: the growth is exact.

    `growing` must be that of `learn_depth`, `learn_width` or both, between models of which one is
    larger than the other (`learning_problems`).
    """

    def trained(values: Tensor) -> Tensor:
        return values.to(device, dtype).requires_grad_()

    produces: dict[Wire, Tensor] = {}
    consumes: dict[Wire, Tensor] = {}
    depth: dict[str, Tensor] = {}
    deeper = growing.depth.layers != same_depth(growing.source).layers
    for spec in parameter_plan(growing.target, tp=1).values():
        if deeper and spec.layer is not None and leaf(spec) not in depth:
            size = growing.source.num_hidden_layers
            depth[leaf(spec)] = trained(_begin_depth(leaf(spec), growing.depth, size))
        for strand in strands(spec, growing.target.tie_word_embeddings):
            if strand is None or growing.width.wires[strand.wire].unchanged:
                continue
            into = consumes if strand.side == "consumes" else produces
            if strand.wire not in into:
                lift, block = growing.width.wires[strand.wire], _block(strand.wire, growing)
                into[strand.wire] = trained(_begin_width(lift, block, into is consumes))
    return Learned(growing, depth, produces, consumes)


def _begin_depth(tensor: str, depth: Depth, size: int) -> Tensor:
    """D: (target layers, source layers)."""
    matrix = torch.zeros(len(depth.layers), size)
    for row, layer in zip(matrix, depth.layers, strict=True):
        if layer.source is not None and not (layer.silent and tensor in LAST_PROJECTIONS):
            row[layer.source] = 1.0
    return matrix


def _begin_width(lift: Lift, block: int, consumes: bool) -> Tensor:
    """B, or A = (B^+)^T."""
    matrix = torch.zeros(lift.grown_size // block, lift.size // block, dtype=torch.float64)
    factor = lift.share / lift.produce if consumes else lift.produce
    for row in range(len(matrix)):
        matrix[row, lift.index[row * block] // block] = factor[row * block]
    return matrix


def grown_slice(spec: ParamSpec, recipe: Recipe, mixed: Tensor, tp: int, tp_rank: int) -> Tensor:
    """A rank's tensor-parallel slice of a parameter of the target, from `mixed`, the mixture of its
    sources (rows, cols); in its type. Padding of the vocabulary is zero. A vector is (rows,)."""
    shape = spec.slice_shape(tp)
    rows, cols = (
        range(first, min(first + count, size))
        for first, count, size in zip(
            spec.slice_origin(tp, tp_rank), shape, (spec.rows, spec.cols), strict=True
        )
    )
    if spec.tp_dim == 1:  # what is sliced comes first: less is left to multiply
        weight = _along(recipe.rows, rows, _along(recipe.cols, cols, mixed.T).T)
    else:
        weight = _along(recipe.cols, cols, _along(recipe.rows, rows, mixed).T).T
    if len(rows) < shape[0]:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, shape[0] - len(rows)))
    return weight.squeeze(1) if spec.is_vector else weight


def _along(mixer: Mixer | None, rows: range, weight: Tensor) -> Tensor:
    return weight[rows.start : rows.stop] if mixer is None else mixer.on_rows(weight, rows)


def forming_flops(learned: Learned, specs: Sequence[ParamSpec]) -> int:
    """Floating-point operations that make some parameters of the target once, whole."""
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


def learned_map(learned: Learned) -> GrowthMap:
    """The map of the learned numbers as they are now. It is not taken to preserve anything.

    Moments follow by policy. With `transport` those of a layer come from the layer that it stood
    for at the start, if it was not a new one, along each axis by the law of lifts with the learned
    matrices: gradients are (B^+)^T g A^+ (docs/reference/operators.md).
    """
    growing = learned.growing
    weights: dict[str, tuple[Term, ...]] = {}
    moments: dict[str, tuple[Term, ...]] = {}
    fills: dict[str, tuple[Fill, ...]] = {}
    start = assemble(growing)
    matrices: dict[AxisRole | None, _Matrices] = {None: (None, None)}
    for name, spec in parameter_plan(growing.target, tp=1).items():
        recipe = learned.recipe(spec)
        along = strands(spec, growing.target.tie_word_embeddings)
        for strand, mixer in zip(along, (recipe.rows, recipe.cols), strict=True):
            if strand not in matrices:
                matrices[strand] = _matrices(mixer, law="exp_avg" in start.kinds)
        (left, left_law), (right, right_law) = (matrices[strand] for strand in along)
        alphas = recipe.alphas.tolist()
        weights[name] = _term(dict(zip(recipe.sources, alphas, strict=True)), left, right)
        moments[name] = _term(_stands_for(learned, spec), left_law, right_law)
        if not weights[name]:
            fills[name] = (Fill(f"{growing.stream}/{name}"),)
    return replace(
        start,
        weights=weights,
        moments=moments,
        fills=fills,
        preserves_function=False,
        scales={},
    )


_Matrices = tuple[np.ndarray | None, np.ndarray | None]
"""What lifts one axis of weights, and what lifts that of their gradients."""


def _matrices(mixer: Mixer | None, law: bool) -> _Matrices:
    if mixer is None:
        return None, None
    small = mixer.matrix.detach().double().cpu().numpy()
    identity = np.eye(mixer.block)
    # (B^+)^T, as the columns of B are independent.
    lawful = np.linalg.solve(small.T @ small, small.T).T if law else small
    return np.kron(small, identity), np.kron(lawful, identity)


def _stands_for(learned: Learned, spec: ParamSpec) -> dict[str, float]:
    """The parameter whose moments go on, if there is one."""
    if spec.layer is None:
        return {spec.name: 1.0}
    layer = learned.growing.depth.layers[spec.layer]
    if layer.fresh or layer.source is None:
        return {}
    return {spec.name.replace(f".{spec.layer}.", f".{layer.source}.", 1): 1.0}


def _term(
    alphas: dict[str, float], left: np.ndarray | None, right: np.ndarray | None
) -> tuple[Term, ...]:
    used = {name: alpha for name, alpha in alphas.items() if alpha}
    if left is None and right is None and list(used.values()) == [1.0]:
        return (Gather(next(iter(used))),)
    return (Dense(tuple(used), tuple(used.values()), left, right),) if used else ()
