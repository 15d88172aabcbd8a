"""Sharding by definition: whole tensors are padded, chunked, flattened, joined and cut.

The same as megagrow/reshard does by arithmetic on ranges, done with tensors instead, and told
nothing by it but the names of the layout's fields.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from megagrow.growth.map import Axis, GrowthMap
from megagrow.parallel.plan import ParamSpec
from megagrow.parallel.zero import STATE_KINDS, Storage
from megagrow.reshard.layout import Layout

State = dict[str, dict[str, Tensor]]
"""Parameter -> kind of state -> the whole logical tensor (rows, cols), fp32."""


def random_state(plan: dict[str, ParamSpec], seed: int = 0) -> State:
    """Different numbers everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {kind: torch.randn(s.rows, s.cols, generator=generator) for kind in STATE_KINDS}
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
    """What a rank stores: 1-D tensors by name, `fill` standing where the vocabulary is padded."""
    dp_rank, tp_rank = divmod(rank, layout.tp)
    slices = {
        name: _slice(layout.plan[name], tensor, layout.tp, tp_rank, fill)
        for name, tensor in whole.items()
    }
    if layout.zero_stage == 0:
        return slices
    if layout.zero_stage == 3:
        groups, multiple = [(name,) for name in whole], layout.dp
    else:
        groups, multiple = layout.groups, 2 * layout.dp
    out = {}
    for group in groups:
        out |= _cut([(name, slices[name]) for name in group], multiple, layout.dp, dp_rank)
    return out


def storage_of(layout: Layout, state: State, rank: int) -> Storage:
    """A rank's part of a whole state."""
    by_kind = {
        kind: held(layout, {name: kinds[kind] for name, kinds in state.items()}, rank)
        for kind in STATE_KINDS
    }
    return {
        name: {kind: by_kind[kind][name].clone() for kind in STATE_KINDS}
        for name in by_kind["fp32"]
    }


def empty_storage(layout: Layout, rank: int) -> Storage:
    """A rank's part before anything is written: NaN, but zero where the vocabulary is padded."""
    nothing = {name: torch.full((s.rows, s.cols), torch.nan) for name, s in layout.plan.items()}
    return storage_of(
        layout, {name: dict.fromkeys(STATE_KINDS, t) for name, t in nothing.items()}, rank
    )


def same(one: Storage, other: Storage) -> bool:
    """Whether two storages hold the same bits."""
    return one.keys() == other.keys() and all(
        torch.equal(kinds[kind], other[name][kind])
        for name, kinds in one.items()
        for kind in STATE_KINDS
    )


def grown(state: State, growth: GrowthMap) -> State:
    """A growth map applied to whole tensors, by indexing."""
    out = {}
    for name, term in growth.terms.items():
        source = state[term.source]
        out[name] = {}
        for kind in STATE_KINDS:
            tensor = _lifted(source[kind], term.rows, kind)
            out[name][kind] = _lifted(tensor.T, term.cols, kind).T.contiguous()
    return out


def _lifted(tensor: Tensor, axis: Axis, kind: str) -> Tensor:
    if axis.index is not None:
        tensor = tensor[torch.from_numpy(axis.index)]
    scale = axis.scale if kind == "fp32" else axis.moment_scale
    if scale is None:
        return tensor
    factors = torch.from_numpy(scale)[:, None]
    return tensor * (factors * factors if kind == "exp_avg_sq" else factors)


def _slice(spec: ParamSpec, tensor: Tensor, tp: int, tp_rank: int, fill: float) -> Tensor:
    if spec.tp_dim is None:
        return tensor.flatten()
    extra = -tensor.shape[0] % tp if spec.row_role == "vocab" else 0
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
