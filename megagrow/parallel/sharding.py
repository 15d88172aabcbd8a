"""Tensor-parallel slices of every parameter, derived from the parameter table of the layer types.

Model building, gradient norms, initialization, growth, resharding and checkpoints all read this
plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.base import (
    VOCAB,
    WRITES_RESIDUAL,
    AxisRole,
    InitialValues,
    sliced_dim,
    sliced_shape,
)
from megagrow.model.layers.table import EMBEDDING, ModelParameter, model_parameters
from megagrow.parallel.optimizers.rules import ADAMW, UpdateRule
from megagrow.parallel.optimizers.rules import STATE_KINDS as STATE_KINDS
from megagrow.parallel.optimizers.rules import StateKind as StateKind
from megagrow.parallel.pipeline.split import PipelineSplit

if TYPE_CHECKING:
    from torch import Tensor

ADAMW_KINDS = ADAMW.kinds
"""States of a parameter that AdamW updates."""

Storage = dict[str, dict[str, "Tensor"]]
"""Parameter -> state kind -> this rank's interval of the flattened slice, 1-D fp32. Parameters
without elements on this rank are absent."""


@dataclass(frozen=True)
class ParamSpec:
    """One logical parameter: its full shape, the roles of its axes, and its slices.

    A vector is a matrix of one column without a column role, so all code handles matrices only.
    `padded_rows` is `rows` rounded up for tensor parallelism: the extra rows of the vocabulary
    exist only on ranks, are zero, and are not part of the logical tensor.
    """

    name: str
    rows: int
    cols: int
    row_role: AxisRole
    col_role: AxisRole | None
    padded_rows: int
    layer: int | None
    initial: InitialValues
    decays: bool
    """True if weight decay of `matrices` includes the parameter."""
    rule: UpdateRule = ADAMW
    """Optimizer of the parameter."""
    norm: str | None = None
    """Gain of the norm whose output the parameter reads."""
    silences: bool = False
    """True if its block adds nothing to the residual stream while the parameter is zero."""

    @property
    def name_in_layer(self) -> str:
        """Return the name without the layer, such as `self_attn.q_proj.weight`."""
        return self.name if self.layer is None else self.name.split(f".{self.layer}.", 1)[1]

    @property
    def kinds(self) -> tuple[StateKind, ...]:
        """Return the states of the parameter."""
        return self.rule.kinds

    @property
    def is_vector(self) -> bool:
        """Return True for a vector."""
        return self.col_role is None

    @property
    def is_growable_matrix(self) -> bool:
        """Return True for a matrix between two axes that can grow, not values of channels."""
        return self.col_role is not None and self.col_role.axis.grown_by is not None

    @property
    def writes_residual(self) -> bool:
        """Return True for the last projection of a block: its output joins the residual stream."""
        return self.row_role == WRITES_RESIDUAL

    @property
    def tp_dim(self) -> int | None:
        """Return the dimension sliced by tensor parallelism; None if every rank holds all of it."""
        return sliced_dim(self.row_role, self.col_role)

    def of_layer(self, layer: int | None) -> str:
        """Return the name of the same parameter in another layer."""
        return in_layer(self.name, self.layer, layer)

    def slice_shape(self, tp: int) -> tuple[int, int]:
        """Return (rows, columns) of one rank's slice, padding included."""
        return sliced_shape(self.padded_rows, self.cols, self.tp_dim, tp)

    def slice_origin(self, tp: int, tp_rank: int) -> tuple[int, int]:
        """Return the first row and column of a rank's slice in the logical tensor."""
        rows, cols = self.slice_shape(tp)
        return (
            tp_rank * rows if self.tp_dim == 0 else 0,
            tp_rank * cols if self.tp_dim == 1 else 0,
        )

    def slice_numel(self, tp: int) -> int:
        """Return the number of elements of one rank's slice, padding included."""
        rows, cols = self.slice_shape(tp)
        return rows * cols


@dataclass(frozen=True)
class Partition:
    """Partition of a model's state under ZeRO `zero_stage` x DP x TP x PP.

    `groups` are the optimizer's parameter groups, names in the engine's order: ZeRO 1 and 2
    flatten the parameters of a group on a pipeline rank into one tensor and partition that.
    Rank = (pp_rank * dp + dp_rank) * tp + tp_rank.
    """

    plan: dict[str, ParamSpec]
    groups: tuple[tuple[str, ...], ...]
    zero_stage: int
    dp: int
    """Ranks over which ZeRO shards: data x context parallel."""
    tp: int
    pipeline: PipelineSplit | None = None
    """None without pipeline parallelism."""

    @property
    def pp(self) -> int:
        """Return the pipeline-parallel size."""
        return 1 if self.pipeline is None else self.pipeline.ranks

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.pp * self.dp * self.tp

    def pipeline_rank(self, name: str) -> int:
        """Return the pipeline rank that holds a parameter."""
        return 0 if self.pipeline is None else holder_of(self.plan[name], self.pipeline)

    @cached_property
    def pipeline_parts(self) -> "tuple[Partition, ...]":
        """Partition of each pipeline rank's parameters over its dp x tp ranks."""
        return tuple(self._on_pipeline_rank(rank) for rank in range(self.pp))

    def _on_pipeline_rank(self, pp_rank: int) -> "Partition":
        if self.pipeline is None:
            return self
        plan = {n: spec for n, spec in self.plan.items() if self.pipeline_rank(n) == pp_rank}
        groups = (tuple(name for name in group if name in plan) for group in self.groups)
        kept = tuple(group for group in groups if group)
        return Partition(plan, kept, self.zero_stage, self.dp, self.tp)

    @property
    def matrices(self) -> UpdateRule:
        """Return the optimizer of the matrices of decoder layers."""
        return next((spec.rule for spec in self.plan.values() if spec.rule != ADAMW), ADAMW)

    def pp_rank(self, rank: int) -> int:
        """Return the pipeline rank of a rank."""
        return rank // (self.dp * self.tp)

    def interval(self, name: str, rank: int) -> range:
        """Return a rank's interval of a parameter's flattened slice; may be empty."""
        pp_rank, dp_rank = divmod(rank // self.tp, self.dp)
        if pp_rank != self.pipeline_rank(name):
            return range(0)
        numel = self.plan[name].slice_numel(self.tp)
        if self.zero_stage == 0:
            return range(numel)
        offset, share = self.placed(name)
        begin = min(max(dp_rank * share - offset, 0), numel)
        return range(begin, max(begin, min((dp_rank + 1) * share - offset, numel)))

    @cached_property
    def shares(self) -> list[tuple[int, int]]:
        """Elements, and bytes of fp32 weights and optimizer state, of each data-parallel rank.

        Without padding; tensor-parallel ranks have equal shares. The partition is that of one
        pipeline rank.
        """
        changes: dict[int, list[int]] = {}  # elements minus those of the rank before, by states
        for name, spec in self.plan.items():
            numel = spec.slice_numel(self.tp)
            own = changes.setdefault(len(spec.kinds), [0] * (self.dp + 1))
            if self.zero_stage == 0:
                own[0] += numel
                continue
            offset, share = self.placed(name)
            first, last = offset // share, (offset + numel - 1) // share
            before, rest = offset - first * share, offset + numel - last * share
            own[first] += share - before
            own[first + 1] += before
            own[last] += rest - share
            own[last + 1] -= rest
        held = {states: list(accumulate(each)) for states, each in changes.items()}
        return [
            (
                sum(each[rank] for each in held.values()),
                sum(4 * states * each[rank] for states, each in held.items()),
            )
            for rank in range(self.dp)
        ]

    def placed(self, name: str) -> tuple[int, int]:
        """Return (offset of the slice in the partitioned tensor, shard size); ZeRO 1, 2 and 3."""
        if self.zero_stage < 3:
            return self._flat[name]
        return 0, -(-self.plan[name].slice_numel(self.tp) // self.dp)

    @cached_property
    def _flat(self) -> dict[str, tuple[int, int]]:
        """Offset of each slice in its flat group, and the shard size; ZeRO 1 and 2."""
        table: dict[str, tuple[int, int]] = {}
        parts = (each.groups for each in self.pipeline_parts)
        for group in chain.from_iterable(parts):
            offsets, total = [], 0
            for name in group:
                offsets.append(total)
                total += self.plan[name].slice_numel(self.tp)
            # DeepSpeed pads a group to two elements per rank (its all-gather's alignment).
            share = pad(total, 2 * self.dp) // self.dp
            table |= {name: (offset, share) for name, offset in zip(group, offsets, strict=True)}
        return table


def holder_of(spec: ParamSpec, pipeline: PipelineSplit) -> int:
    """Return the pipeline rank that holds a parameter.

    A tied head is no parameter: its weight is that of the embedding, on the first rank.
    """
    if spec.layer is not None:
        return pipeline.rank_of_layer(spec.layer)
    return 0 if spec.name == EMBEDDING.name else pipeline.ranks - 1


def in_layer(name: str, old: int | None, new: int | None) -> str:
    """Return a parameter name with the layer index replaced; None is a name outside the layers."""
    if old is None or new is None:
        return name
    return name.replace(f".{old}.", f".{new}.", 1)


def pad(size: int, multiple: int) -> int:
    """Return `size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def real_rows(rows: int, slice_rows: int, tp_rank: int) -> int:
    """Return the number of rows in a rank's slice of `slice_rows` that are not padding."""
    return min(max(rows - tp_rank * slice_rows, 0), slice_rows)


def parameter_plan(
    model: ModelConfig, tp: int, matrices: UpdateRule = ADAMW
) -> dict[str, ParamSpec]:
    """Return every parameter of the model by name, in the order of the module tree.

    `matrices` is the optimizer of the matrices of decoder layers that are products with the
    activations; all other parameters have AdamW.
    """
    return {each.name: _spec(each, model, tp, matrices) for each in model_parameters(model)}


def kinds_in(plan: Mapping[str, ParamSpec]) -> tuple[StateKind, ...]:
    """Return the states that any parameter has."""
    found = {kind for rule in {spec.rule for spec in plan.values()} for kind in rule.kinds}
    return tuple(kind for kind in STATE_KINDS if kind in found)


def _spec(
    parameter: ModelParameter, model: ModelConfig, tp: int, matrices: UpdateRule
) -> ParamSpec:
    declaration = parameter.declaration
    is_product = declaration.is_product and not declaration.is_vector
    in_layer = parameter.layer is not None and not declaration.is_depthwise
    rows, cols = declaration.shape(model)
    return ParamSpec(
        name=parameter.name,
        rows=rows,
        cols=cols,
        row_role=declaration.row_role,
        col_role=declaration.col_role,
        padded_rows=pad(rows, tp) if declaration.row_role.axis == VOCAB else rows,
        layer=parameter.layer,
        initial=declaration.initial(model),
        decays=is_product,
        rule=matrices if is_product and in_layer else ADAMW,
        norm=parameter.norm,
        silences=parameter.silences,
    )
