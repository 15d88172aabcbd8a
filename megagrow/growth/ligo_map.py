"""From learned numbers to the GrowthMap by which they are applied once and for all."""

from dataclasses import replace

import numpy as np

from megagrow.growth.build_map import assemble
from megagrow.growth.ligo import Learned, Mixer
from megagrow.growth.map import Dense, Fill, Gather, GrowthMap, Term
from megagrow.growth.tensor_axes import Strand, strands
from megagrow.parallel.sharding import ParamSpec, parameter_plan


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
    matrices: dict[Strand | None, _Matrices] = {None: (None, None)}
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
