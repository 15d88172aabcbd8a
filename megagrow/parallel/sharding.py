"""Tensor-parallel slices of every parameter, derived from the parameter table of the layer types.

Model building, gradient norms, initialization, growth, resharding and checkpoints all read this
plan.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.base import (
    VOCAB,
    WRITES_RESIDUAL,
    AxisRole,
    InitialValues,
    sliced_dim,
    sliced_shape,
)
from megagrow.model.layers.table import ModelParameter, model_parameters

if TYPE_CHECKING:
    from torch import Tensor

StateKind = Literal["fp32", "exp_avg", "exp_avg_sq"]
"""States of every parameter: fp32 master weight, Adam's first and second moment."""

STATE_KINDS: tuple[StateKind, ...] = get_args(StateKind)

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
    norm: str | None = None
    """Gain of the norm whose output the parameter reads."""
    silences: bool = False
    """True if its block adds nothing to the residual stream while the parameter is zero."""

    @property
    def name_in_layer(self) -> str:
        """Return the name without the layer, such as `self_attn.q_proj.weight`."""
        return self.name if self.layer is None else self.name.split(f".{self.layer}.", 1)[1]

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


def parameter_plan(model: ModelConfig, tp: int) -> dict[str, ParamSpec]:
    """Return every parameter of the model by name, in the order of the module tree."""
    return {each.name: _spec(each, model, tp) for each in model_parameters(model)}


def _spec(parameter: ModelParameter, model: ModelConfig, tp: int) -> ParamSpec:
    declaration = parameter.declaration
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
        decays=declaration.is_product and not declaration.is_vector,
        norm=parameter.norm,
        silences=parameter.silences,
    )
