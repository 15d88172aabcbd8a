"""Isometric growth of the residual stream: x' = Q x with Q^T Q = I (docs/reference/operators.md).
Exact.

It supports any new width, without copies or dead coordinates: every new coordinate mixes all old
ones. The gains of the norms do not commute with Q and are folded into the matrices that read them,
which requires an untied head.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from megagrow.growth.build_map import GrowthSpec, assemble, kinds_of, without_fresh
from megagrow.growth.map import Dense, Fill, Fresh, GrowthMap, Term
from megagrow.model.layers.base import ONES, READS_RESIDUAL, WRITES_RESIDUAL
from megagrow.parallel.sharding import ParamSpec, in_layer, parameter_plan


def orthonormal(size: int, grown: int, generator: np.random.Generator) -> np.ndarray:
    """Return Q, (grown, size) fp64 with orthonormal columns, spread over all coordinates."""
    q, r = np.linalg.qr(generator.standard_normal((grown, size)))
    return q * np.sign(np.diag(r))


def isometric_map(growth: GrowthSpec, generator: np.random.Generator) -> GrowthMap:
    """Return the map of a growth of any depth whose residual stream is rotated by a random Q.

    Moments follow the same lift: m is exact on the range of Q, v assumes uncorrelated entries.
    Gains of norms are folded away and restart at 1.
    """
    q = orthonormal(growth.source.hidden_size, growth.target.hidden_size, generator)
    scale = (growth.source.hidden_size / growth.target.hidden_size) ** 0.5
    lifts = _Lifts(q, scale)
    base = assemble(growth)
    weights: dict[str, tuple[Term, ...]] = {}
    moments: dict[str, tuple[Term, ...]] = {}
    fills: dict[str, tuple[Fill, ...]] = {}
    for name, spec in parameter_plan(growth.target, tp=1).items():
        stream = f"{growth.stream}/{name}"
        fills[name] = base.fills.get(name, ())
        if spec.row_role.side in ("gain", "tied gain"):
            weights[name] = moments[name] = ()
            fills[name] = (Fill(stream, initial=ONES, new_rows=np.ones(spec.rows, bool)),)
        elif not base.weights[name]:
            weights[name] = moments[name] = ()
        elif not {READS_RESIDUAL, WRITES_RESIDUAL} & {spec.row_role, spec.col_role}:
            weights[name], moments[name] = base.weights[name], base.moments[name]
        else:
            layer = None if spec.layer is None else growth.depth.layers[spec.layer].source
            weights[name], moments[name] = _rotated(spec, layer, lifts)
            if not base.moments[name]:  # the layer is still silent
                moments[name] = ()
            if spec.col_role == READS_RESIDUAL:
                std = spec.initial.scale
                fills[name] = (Fill(stream, ((std, std), (std, std)), basis=q),)
    fresh = {name: Fresh(whole=found.whole) for name, found in base.fresh.items()}
    if growth.policy in ("asymmetric", "estimate_second_moment"):
        moments = {name: without_fresh(terms, fresh[name]) for name, terms in moments.items()}
    return replace(
        base,
        weights=weights,
        moments=moments,
        fills={name: found for name, found in fills.items() if found},
        kinds=kinds_of(growth.policy),
        fresh=fresh,
        scales={},
    )


@dataclass(frozen=True, eq=False)
class _Lifts:
    """Matrices shared by all terms, since they may be large."""

    q: np.ndarray
    scale: float
    """Gain s of the norms; rms_norm_eps takes its square."""

    @cached_property
    def weight(self) -> np.ndarray:
        """Return s Q, for weights that read the stream."""
        return self.q * self.scale

    @cached_property
    def moment(self) -> np.ndarray:
        """Return Q / s, for their first moments."""
        return self.q / self.scale


def _rotated(
    spec: ParamSpec, source_layer: int | None, lifts: _Lifts
) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """Return the terms of a matrix on the residual stream, of its weights and its first moment.

    Gradients are g' = Q g for producers of the stream, and g' = g gain^-1 Q^T / s for consumers.
    """
    source = (spec.of_layer(source_layer),)
    if spec.col_role == READS_RESIDUAL:
        assert spec.norm is not None
        gain = in_layer(spec.norm, spec.layer, source_layer)
        rows = lifts.scale if spec.row_role.side == "produces normed" else 1.0
        weight = Dense(source, (rows,), right=lifts.weight, gain=gain)
        moment = Dense(source, (1 / rows,), right=lifts.moment, gain=gain, gain_power=-1)
        return (weight,), (moment,)
    left, right = (None, lifts.q) if spec.col_role == WRITES_RESIDUAL else (lifts.q, None)
    term = Dense(source, (1.0,), left, right)
    return (term,), (term,)
