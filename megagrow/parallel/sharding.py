"""The one table that says what every parameter is and how tensor parallelism slices it.

Model building, gradient norms, initialisation, growth, resharding and checkpoints all read it, so
that no two of them can disagree.
"""

from dataclasses import dataclass
from typing import Literal

from megagrow.config.schema import ModelConfig

Role = Literal["vocab", "residual", "query", "kv", "ffn", "none"]
"""What an axis counts: growth lifts all axes of one role together."""

_SLICED: frozenset[Role] = frozenset({"vocab", "query", "kv", "ffn"})
"""Roles whose axis tensor parallelism splits; the residual stream is whole on every rank."""


@dataclass(frozen=True)
class ParamSpec:
    """One logical parameter: its full shape, and what its axes mean.

    A vector is a matrix of one column (`cols` == 1, role `none`), so that all code sees matrices.
    `padded_rows` is `rows` rounded up for tensor parallelism: the extra rows of the vocabulary
    exist only on ranks, hold zeros, and belong to no logical tensor.
    """

    name: str
    rows: int
    cols: int
    row_role: Role
    col_role: Role
    padded_rows: int
    layer: int | None
    is_vector: bool
    init_std: float
    """Standard deviation at the start; 0 stands for the constant 1 of a norm's gain."""

    @property
    def tp_dim(self) -> int | None:
        """The dimension that tensor parallelism slices, or None where every rank has it whole."""
        if self.row_role in _SLICED:
            return 0
        return 1 if self.col_role in _SLICED else None

    def slice_shape(self, tp: int) -> tuple[int, int]:
        """(rows, columns) of one rank's slice, padding included."""
        if self.tp_dim == 0:
            return self.padded_rows // tp, self.cols
        return self.rows, self.cols // tp if self.tp_dim == 1 else self.cols

    def slice_origin(self, tp: int, tp_rank: int) -> tuple[int, int]:
        """Row and column of the logical tensor at which a rank's slice begins."""
        rows, cols = self.slice_shape(tp)
        return (
            tp_rank * rows if self.tp_dim == 0 else 0,
            tp_rank * cols if self.tp_dim == 1 else 0,
        )

    def slice_numel(self, tp: int) -> int:
        """Elements of one rank's slice, padding included."""
        rows, cols = self.slice_shape(tp)
        return rows * cols


def pad(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def real_rows(rows: int, slice_rows: int, tp_rank: int) -> int:
    """Of a rank's slice of `slice_rows`, those that are no padding beyond `rows` in all."""
    return min(max(rows - tp_rank * slice_rows, 0), slice_rows)


_Entry = tuple[int, int, Role, Role, float]
"""Rows, columns, their roles, and the initial standard deviation."""


def parameter_plan(model: ModelConfig, tp: int) -> dict[str, ParamSpec]:
    """Every parameter of the model, in the order in which the module tree holds them."""
    width, ffn = model.hidden_size, model.intermediate_size
    q_width = model.num_attention_heads * model.head_dim
    kv_width = model.num_key_value_heads * model.head_dim
    std = model.initializer_range
    output_std = std / (2 * model.num_hidden_layers) ** 0.5
    vocab: _Entry = (model.vocab_size, width, "vocab", "residual", std)
    gain: _Entry = (width, 1, "residual", "none", 0.0)
    block: dict[str, _Entry] = {
        "input_layernorm": gain,
        "self_attn.q_proj": (q_width, width, "query", "residual", std),
        "self_attn.k_proj": (kv_width, width, "kv", "residual", std),
        "self_attn.v_proj": (kv_width, width, "kv", "residual", std),
        "self_attn.o_proj": (width, q_width, "residual", "query", output_std),
        "post_attention_layernorm": gain,
        "mlp.gate_proj": (ffn, width, "ffn", "residual", std),
        "mlp.up_proj": (ffn, width, "ffn", "residual", std),
        "mlp.down_proj": (width, ffn, "residual", "ffn", output_std),
    }
    table: dict[str, tuple[int | None, _Entry]] = {"model.embed_tokens": (None, vocab)}
    for layer in range(model.num_hidden_layers):
        for name, entry in block.items():
            table[f"model.layers.{layer}.{name}"] = (layer, entry)
    table["model.norm"] = (None, gain)
    if not model.tie_word_embeddings:
        table["lm_head"] = (None, vocab)
    return {f"{name}.weight": _spec(f"{name}.weight", *entry, tp) for name, entry in table.items()}


def _spec(name: str, layer: int | None, entry: _Entry, tp: int) -> ParamSpec:
    rows, cols, row_role, col_role, std = entry
    padded = pad(rows, tp) if row_role == "vocab" else rows
    return ParamSpec(
        name, rows, cols, row_role, col_role, padded, layer, col_role == "none", init_std=std
    )
