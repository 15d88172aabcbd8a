"""Vocabulary of a layer declaration: activation axes, axis roles, parameters, layer types.

Declarations are data about a model and import no torch: the configuration counts parameters with
them. The `nn.Module` of a type is imported by `LayerType.build`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.costs import (
    ContextElements,
    KernelArguments,
    KernelInputs,
    MicroBatch,
    RowElements,
    none,
    of_single_tokens,
)

if TYPE_CHECKING:
    from torch import nn

    from megagrow.model.layers.decoding import DecodedSequences, DecodingState

AxisSide = Literal["produces", "produces normed", "consumes", "gain", "tied gain"]
"""Effect of a parameter on an activation axis.

`produces` writes the axis and `consumes` reads it. `produces normed` writes it before an RMSNorm
over its entries. `gain` scales it entry by entry. `tied gain` is
the gain of a norm whose output is read by the embedding matrix (a tied head).
"""

Distribution = Literal["constant", "normal", "uniform", "log of column", "inverse softplus"]


class InitialValues(NamedTuple):
    """Distribution of the initial values of a parameter; `reshard/fill.py` draws them."""

    distribution: Distribution
    """`constant`: `scale`. `normal`: mean 0, standard deviation `scale`. `uniform`: from -`scale`
    to `scale`. `log of column`: log(1 + column). `inverse softplus`: the x with softplus(x) = dt
    for a dt that is log-uniform from `DT_RANGE`."""
    scale: float = 1.0


ZEROS, ONES = InitialValues("constant", 0.0), InitialValues("constant", 1.0)

DT_RANGE = (1e-3, 0.1)
"""Initial step sizes of Mamba (Gu and Dao 2023, section 3.6). The floor of 1e-4 in the original
code is below this range."""


def normal(config: ModelConfig) -> InitialValues:
    """Return the default: normal with standard deviation `initializer_range`."""
    return InitialValues("normal", config.initializer_range)


def scaled_normal(config: ModelConfig) -> InitialValues:
    """Return the values of last projections: the standard deviation is divided by
    sqrt(2 num_hidden_layers), as in Megatron-LM."""
    return InitialValues("normal", config.initializer_range / (2 * config.num_hidden_layers) ** 0.5)


def ones(config: ModelConfig) -> InitialValues:
    """Return the constant 1."""
    return ONES


def zeros(config: ModelConfig) -> InitialValues:
    """Return the constant 0."""
    return ZEROS


@dataclass(frozen=True)
class ActivationAxis:
    """Vector of activations that passes between blocks, and the config fields of its size."""

    name: str
    sizes: tuple[str, ...]
    """Fields of ModelConfig whose product is the number of entries."""
    grown_by: str | None
    """Field that counts the units of growth: a width operator adds complete units. None: width
    operators do not change the axis."""
    block: str | None = None
    """Field with the number of entries that LiGO mixes as one; None: every entry is mixed alone."""
    sliced: bool = True
    """True if tensor parallelism slices the axis."""

    def size(self, config: ModelConfig) -> int:
        """Return the number of entries in a model."""
        return prod(getattr(config, field) for field in self.sizes)

    @property
    def produced(self) -> "AxisRole":
        """Return the role of a parameter that writes the axis."""
        return AxisRole(self, "produces")

    @property
    def normed(self) -> "AxisRole":
        """Return the role of a parameter that writes the axis before an RMSNorm of it."""
        return AxisRole(self, "produces normed")

    @property
    def consumed(self) -> "AxisRole":
        """Return the role of a parameter that reads the axis."""
        return AxisRole(self, "consumes")


class AxisRole(NamedTuple):
    """Activation axis of the rows or columns of a parameter, and the parameter's effect on it."""

    axis: ActivationAxis
    side: AxisSide


def sliced_dim(row_role: AxisRole, col_role: AxisRole | None) -> int | None:
    """Return the dimension of a parameter that tensor parallelism slices; None for none.

    0 is a column-parallel layer of Megatron-LM (slices of the outputs), 1 a row-parallel one.
    """
    if row_role.axis.sliced:
        return 0
    return 1 if col_role is not None and col_role.axis.sliced else None


def sliced_shape(rows: int, cols: int, dim: int | None, tp: int) -> tuple[int, int]:
    """Return (rows, columns) of the slice of a tensor-parallel rank; `dim` as of `sliced_dim`."""
    return rows // tp if dim == 0 else rows, cols // tp if dim == 1 else cols


VOCAB = ActivationAxis("vocab", ("vocab_size",), "vocab_size")
RESIDUAL = ActivationAxis("residual", ("hidden_size",), "hidden_size", sliced=False)

WRITES_RESIDUAL, READS_RESIDUAL = RESIDUAL.produced, RESIDUAL.consumed


@dataclass(frozen=True)
class ParameterDeclaration:
    """One parameter of a layer type. Its shape follows from the axes of its roles.

    A vector has no column role: it is a matrix of one column, so all code handles matrices only.
    """

    name: str
    """Path within the block, such as `q_proj.weight`."""
    row_role: AxisRole
    col_role: AxisRole | None
    initial: Callable[[ModelConfig], InitialValues] = normal
    """Initial values, which new entries of a vector or of a channel also have."""
    is_product: bool = True
    """True if a matrix multiplies activations: its product counts as FLOPs, and weight decay of
    `matrices` includes it."""
    is_depthwise: bool = False
    """True for the taps of a convolution of each channel, which is not a matrix product."""

    @property
    def is_vector(self) -> bool:
        """Return True for a vector."""
        return self.col_role is None

    def shape(self, config: ModelConfig) -> tuple[int, int]:
        """Return (rows, columns)."""
        cols = 1 if self.col_role is None else self.col_role.axis.size(config)
        return self.row_role.axis.size(config), cols

    def slice_shape(self, config: ModelConfig, tp: int) -> tuple[int, int]:
        """Return (rows, columns) of the slice of a tensor-parallel rank, without padding."""
        return sliced_shape(*self.shape(config), sliced_dim(self.row_role, self.col_role), tp)

    @property
    def is_sliced(self) -> bool:
        """Return True if tensor parallelism slices the parameter."""
        return sliced_dim(self.row_role, self.col_role) is not None

    def numel(self, config: ModelConfig) -> int:
        """Return the number of elements."""
        return prod(self.shape(config))

    def matmul_flops(self, config: ModelConfig) -> int:
        """Return the training FLOPs per token of the product with a matrix; 0 if there is none.

        A matrix element takes 2 FLOPs in the forward pass and 4 in the backward pass.
        """
        return 6 * self.numel(config) if self.is_product and not self.is_vector else 0


@dataclass(frozen=True)
class LayerType:
    """Properties of one type of block used by the other packages.

    A block reads the residual stream and adds its output to it; a norm precedes or follows it.
    Tensor parallelism slices the axes that are `sliced`, and needs one collective before and one
    after the block; the module marks further sums over ranks (`layers/modules.py`). Growth
    lifts the axes of the parameters.

    Limits of a declaration: parameters are matrices and vectors, and a block sees documents only
    through its `Context`.
    """

    name: str
    """Name of the block within a decoder layer, such as `self_attn`."""
    label: str
    """Name of the products with weights in tables of FLOPs."""
    parameters: Callable[[ModelConfig], tuple[ParameterDeclaration, ...]]
    """Parameters in the order of the module tree."""
    activation_bytes: Callable[[ModelConfig, MicroBatch], int]
    """Bytes that the backward pass keeps of a micro-batch, without the input of the block. The
    tensor-parallel ranks share them equally."""
    build: "Callable[[ModelConfig], nn.Module]"
    """Return the module, a `megagrow.model.layers.modules.LayerModule`."""
    row_elements: Callable[[ModelConfig], RowElements]
    """Return the memory traffic of the block, which the tensor-parallel ranks share; the norm of
    its input or output is not included."""
    kernel_calls: Callable[[ModelConfig, KernelInputs], Iterable[KernelArguments]]
    """Return the Triton ops of a block on one tensor-parallel rank."""
    score_label: str = ""
    """Name of the products between activations in tables of FLOPs."""
    score_flops: Callable[[ModelConfig, int], int] = none
    """(config, sequence length): training FLOPs per token of products between activations."""
    score_products: Callable[[ModelConfig, int, int], int] = none
    """(config, sequence length, masked): those of `score_flops` that kernels compute as matrix
    products. The blocks at each edge of the visible positions have `masked` positions per query
    that are computed in vain."""
    partial_sums: Callable[[ModelConfig, int], int] = none
    """(config, bytes per element): bytes per token of sums over tensor-parallel ranks within the
    block (`PartialSum`), in the forward pass; the backward pass has as many."""
    context_elements: Callable[[ModelConfig, int, str], ContextElements] = of_single_tokens
    """(config, tensor-parallel size, `parallel.cp_comm_type`): exchange between context-parallel
    ranks."""
    joint_inputs: bool = False
    """True if the planner times the projections of the block's input as one product."""
    decoding_state: "Callable[[DecodedSequences], DecodingState] | None" = None
    """Return the empty state of a block for incremental decoding; None if the output at a position
    depends on the input at this position only."""

    def numel(self, config: ModelConfig) -> int:
        """Return the number of elements of all parameters."""
        return sum(each.numel(config) for each in self.parameters(config))

    def matmul_flops(self, config: ModelConfig) -> int:
        """Return the training FLOPs per token of products with weights."""
        return sum(each.matmul_flops(config) for each in self.parameters(config))
