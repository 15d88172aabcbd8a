"""Isometric growth of the residual stream: x' = Q x with Q^T Q = I (docs/reference/operators.md).
Exact.

Any new width, no copies and no dead coordinates: every coordinate of the new stream mixes all old
ones. The gains of the norms are folded into the matrices that read them, since they do not commute
with Q; the head has to be untied for that.
"""

from dataclasses import dataclass, replace

import numpy as np

from megagrow.growth.build_map import GrowthSpec, assemble, kinds_of, without_fresh
from megagrow.growth.map import Dense, Fill, Fresh, Gather, GrowthMap, Term
from megagrow.growth.tensor_axes import AxisRole, leaf, strands
from megagrow.parallel.sharding import ParamSpec, parameter_plan

_GAIN_OF = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
}


def orthonormal(size: int, grown: int, generator: np.random.Generator) -> np.ndarray:
    """Q, (grown, size) fp64 with orthonormal columns, spread over all coordinates."""
    q, r = np.linalg.qr(generator.standard_normal((grown, size)))
    return q * np.sign(np.diag(r))


def isometric_map(growing: GrowthSpec, generator: np.random.Generator) -> GrowthMap:
    """The map of a growth whose depth is any and whose residual stream is turned by a random Q.

    Moments follow by the same lift: m exactly on what the source could express, v as if the mixed
    entries were uncorrelated. Norms begin again: their gains are folded away.
    """
    q = orthonormal(growing.source.hidden_size, growing.target.hidden_size, generator)
    scale = (growing.source.hidden_size / growing.target.hidden_size) ** 0.5
    lifts = _Lifts(q, q * scale, q / scale)
    base = assemble(growing)
    weights: dict[str, tuple[Term, ...]] = {}
    moments: dict[str, tuple[Term, ...]] = {}
    fills: dict[str, tuple[Fill, ...]] = {}
    for name, spec in parameter_plan(growing.target, tp=1).items():
        stream = f"{growing.stream}/{name}"
        fills[name] = base.fills.get(name, ())
        if spec.is_vector:
            weights[name] = moments[name] = ()
            fills[name] = (Fill(stream, constant=1.0, new_rows=np.ones(spec.rows, bool)),)
        elif not base.weights[name]:
            weights[name] = moments[name] = ()
        else:
            term = base.weights[name][0]
            assert isinstance(term, Gather)
            weights[name], moments[name] = _turned(spec, term.source, lifts)
            if not base.moments[name]:  # of a layer that is silent yet
                moments[name] = ()
            if _reads_residual(spec):
                std = spec.init_std
                fills[name] = (Fill(stream, ((std, std), (std, std)), basis=q),)
    fresh = {name: Fresh(whole=found.whole) for name, found in base.fresh.items()}
    if growing.policy in ("asymmetric", "estimate_second_moment"):
        moments = {name: without_fresh(terms, fresh[name]) for name, terms in moments.items()}
    return replace(
        base,
        weights=weights,
        moments=moments,
        fills={name: found for name, found in fills.items() if found},
        kinds=kinds_of(growing.policy),
        fresh=fresh,
        scales={},
    )


def _reads_residual(spec: ParamSpec) -> bool:
    return strands(spec, tied=False)[1] == AxisRole("residual", "consumes")


@dataclass(frozen=True, eq=False)
class _Lifts:
    """The matrices of all terms, each once in memory: they may be large."""

    q: np.ndarray
    weight: np.ndarray
    """Of weights that read the stream: s Q."""
    moment: np.ndarray
    """Of their first moments: Q / s."""


def _turned(
    spec: ParamSpec, origin: str, lifts: _Lifts
) -> tuple[tuple[Term, ...], tuple[Term, ...]]:
    """The terms of a matrix's weights and of its first moment: gradients are g' = Q g for what is
    written to the stream, and g' = g gain^-1 Q^T / s for what reads it."""
    if leaf(spec) == "embed_tokens":
        term = Dense((origin,), (1.0,), right=lifts.q)
        return (term,), (term,)
    if not _reads_residual(spec):
        term = Dense((origin,), (1.0,), left=lifts.q)
        return (term,), (term,)
    gain = _gain(spec, origin)
    weight = Dense((origin,), (1.0,), right=lifts.weight, gain=gain)
    moment = Dense((origin,), (1.0,), right=lifts.moment, gain=gain, gain_power=-1)
    return (weight,), (moment,)


def _gain(spec: ParamSpec, origin: str) -> str:
    if leaf(spec) == "lm_head":
        return "model.norm.weight"
    layer = ".".join(origin.split(".")[:3])
    return f"{layer}.{_GAIN_OF[leaf(spec)]}.weight"
