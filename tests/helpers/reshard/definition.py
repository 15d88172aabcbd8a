"""Sharding by definition: whole tensors are padded, chunked, flattened, joined and cut.

The same as megagrow/reshard does by arithmetic on ranges, done with tensors instead, and told
nothing by it but the names of the layout's fields.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from megagrow.growth.map import Axis, Dense, Fill, Gather, GrowthMap
from megagrow.model.layers.base import VOCAB
from megagrow.parallel.sharding import STATE_KINDS, ParamSpec, Storage
from megagrow.reshard.fill import initial_values, normal
from megagrow.reshard.layout import Layout

State = dict[str, dict[str, Tensor]]
"""Parameter -> kind of state -> the whole logical tensor (rows, cols), fp32."""


def random_state(plan: dict[str, ParamSpec], seed: int = 0) -> State:
    """Different numbers everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {kind: torch.randn(s.rows, s.cols, generator=generator) for kind in s.kinds}
        for name, s in plan.items()
    }


def numbered(plan: dict[str, ParamSpec]) -> dict[str, Tensor]:
    """For every element of the logical tensors a number of its own, from 0 on."""
    out, first = {}, 0
    for name, spec in plan.items():
        size = spec.rows * spec.cols
        out[name] = torch.arange(first, first + size).view(spec.rows, spec.cols)
        first += size
    return out


def held(layout: Layout, whole: dict[str, Tensor], rank: int, fill: float = 0) -> dict[str, Tensor]:
    """Storage of a rank: 1-D tensors by name, `fill` standing where the vocabulary is padded."""
    pp_rank, dp_rank = divmod(rank // layout.tp, layout.dp)
    tp_rank = rank % layout.tp
    whole = {name: t for name, t in whole.items() if layout.pipeline_rank(name) == pp_rank}
    slices = {
        name: _slice(layout.plan[name], tensor, layout.tp, tp_rank, fill)
        for name, tensor in whole.items()
    }
    if layout.zero_stage == 0:
        return slices
    if layout.zero_stage == 3:
        groups, multiple = [(name,) for name in whole], layout.dp
    else:
        local = ([name for name in group if name in whole] for group in layout.groups)
        groups, multiple = [group for group in local if group], 2 * layout.dp
    out = {}
    for group in groups:
        out |= _cut([(name, slices[name]) for name in group], multiple, layout.dp, dp_rank)
    return out


def storage_of(layout: Layout, state: State, rank: int) -> Storage:
    """A rank's part of a whole state."""
    by_kind = {
        kind: held(layout, {n: kinds.get(kind, kinds["fp32"]) for n, kinds in state.items()}, rank)
        for kind in STATE_KINDS
    }
    return {
        name: {kind: by_kind[kind][name].clone() for kind in layout.plan[name].kinds}
        for name in by_kind["fp32"]
    }


def empty_storage(layout: Layout, rank: int, value: float = torch.nan) -> Storage:
    """A rank's part before anything is written: NaN (or another value), but zero where the
    vocabulary is padded."""
    nothing = {name: torch.full((s.rows, s.cols), value) for name, s in layout.plan.items()}
    kinds = {name: spec.kinds for name, spec in layout.plan.items()}
    return storage_of(layout, {n: dict.fromkeys(kinds[n], t) for n, t in nothing.items()}, rank)


def same(one: Storage, other: Storage) -> bool:
    """Return True if two storages hold the same bits."""
    return one.keys() == other.keys() and all(
        kinds.keys() == other[name].keys()
        and all(torch.equal(values, other[name][kind]) for kind, values in kinds.items())
        for name, kinds in one.items()
    )


def grown(state: State, growth: GrowthMap, plan: dict[str, ParamSpec]) -> State:
    """A growth map applied to whole tensors: fills by their definition, gathers by indexing, and
    dense terms by products in fp64."""
    return {
        name: {kind: _made(state, growth, spec, kind) for kind in spec.kinds}
        for name, spec in plan.items()
    }


def _made(state: State, growth: GrowthMap, spec: ParamSpec, kind: str) -> Tensor:
    total = torch.zeros(spec.rows, spec.cols)
    fills = growth.fills.get(spec.name, ()) if kind == "fp32" else ()
    if fills:
        total = sum(filled(fill, spec.rows, spec.cols) for fill in fills).float()
    for term in growth.terms(spec.name, kind):
        if isinstance(term, Gather):
            made = _lifted(_lifted(state[term.source][kind], term.rows).T, term.cols).T
        else:
            made = mixed(state, term, kind).float()
        total = total + made
    return total.contiguous()


def _lifted(tensor: Tensor, axis: Axis) -> Tensor:
    if axis.index is not None:
        index = torch.from_numpy(axis.index)
        tensor = tensor[index] * (index >= 0)[:, None]
    if axis.scale is None:
        return tensor
    return tensor * torch.from_numpy(axis.scale).float()[:, None]


def mixed(state: State, term: Dense, kind: str) -> Tensor:
    """A dense term of whole tensors: (target rows, target cols) fp64."""
    total = sum(
        alpha * state[name][kind].double()
        for alpha, name in zip(term.alphas, term.sources, strict=True)
    )
    if term.gain is not None:
        gain = state[term.gain]["fp32"].double().T
        total = torch.where(gain == 0, 0.0, total * gain**term.gain_power)
    if term.left is not None:
        total = torch.from_numpy(term.left) @ total
    return total if term.right is None else total @ torch.from_numpy(term.right).T


def filled(fill: Fill, rows: int, cols: int) -> Tensor:
    """A fill, element by element: (rows, cols) fp64."""
    values = normal(fill.stream, 0, rows * cols).view(rows, cols).double()
    if fill.center is not None:
        for label in set(fill.center.tolist()):
            same = torch.from_numpy(fill.center == label)
            values[:, same] -= values[:, same].mean(1, keepdim=True)
    if fill.basis is not None:
        basis = torch.from_numpy(fill.basis)
        values -= values @ (basis @ basis.T)
    new_rows = np.zeros(rows, bool) if fill.new_rows is None else fill.new_rows
    new_cols = np.zeros(cols, bool) if fill.new_cols is None else fill.new_cols
    initial = initial_values(fill.initial, fill.stream, range(rows), cols).double()
    for i, row in enumerate(new_rows.tolist()):
        for j, col in enumerate(new_cols.tolist()):
            values[i, j] *= fill.std[row][col]
            values[i, j] += initial[i, j] * row
    return values


def _slice(spec: ParamSpec, tensor: Tensor, tp: int, tp_rank: int, fill: float) -> Tensor:
    if spec.tp_dim is None:
        return tensor.flatten()
    extra = -tensor.shape[0] % tp if spec.row_role.axis == VOCAB else 0
    padded = pad(tensor, (0, 0, 0, extra), value=fill)
    return padded.chunk(tp, dim=spec.tp_dim)[tp_rank].flatten().contiguous()


def _cut(
    slices: Iterable[tuple[str, Tensor]], multiple: int, dp: int, dp_rank: int
) -> dict[str, Tensor]:
    """One rank's share of slices laid end to end and padded to a multiple."""
    names, tensors = zip(*slices, strict=True)
    owner = torch.cat([torch.full(t.shape, index) for index, t in enumerate(tensors)])
    joined = torch.cat(tensors)
    extra = -joined.numel() % multiple
    owner = pad(owner, (0, extra), value=-1).chunk(dp)[dp_rank]
    share = pad(joined, (0, extra)).chunk(dp)[dp_rank]
    parts = {name: share[owner == index] for index, name in enumerate(names)}
    return {name: part for name, part in parts.items() if part.numel()}
