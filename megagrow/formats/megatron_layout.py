"""Composition of Megatron-LM's fused tensors from logical tensors. Pure.

Each fused tensor is a vertical stack of parts of logical tensors. `linear_qkv` of a tensor-parallel
rank contains, for each key-value head, its query heads, its key head and its value head;
`linear_fc1` contains the rank's slices of gate and up. The vocabulary is padded with zeros to a
multiple of make_vocab_size_divisible_by times the tensor-parallel size.

Sources: megatron/core/transformer/attention.py and megatron/core/transformer/mlp.py.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

from megagrow.checkpoint.tensor_file import DTYPES, Stored
from megagrow.config.schema import ModelConfig
from megagrow.errors import CheckpointError, ConfigError
from megagrow.formats.megatron_args import check_features
from megagrow.model.layers.table import EMBEDDING, FINAL_NORM, HEAD, indivisible_sizes
from megagrow.parallel.sharding import ParamSpec, pad, parameter_plan
from megagrow.reshard.layout import Block

_OLD_NAMES = (
    (r"^language_model\.(encoder|transformer)\.", "decoder."),
    (r"^language_model\.", ""),
    (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.input_(layer)?norm\.weight$", ".self_attention.linear_qkv.layer_norm_weight"),
    (r"\.(post_attention|pre_mlp)_(layer)?norm\.weight$", ".mlp.linear_fc1.layer_norm_weight"),
    (r"\.final_norm\.weight$", ".final_layernorm.weight"),
)
"""Names of Megatron-LM before its core, and of its core without Transformer Engine."""


class TensorPart(NamedTuple):
    """Rectangle of a logical tensor and the row of the fused tensor at which it starts."""

    name: str
    block: Block
    row: int


class Fused(NamedTuple):
    """Fused tensor of one tensor-parallel rank."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]

    @property
    def cols(self) -> int:
        return self.shape[1] if len(self.shape) == 2 else 1


def current_name(name: str) -> str:
    """Return the name used by Megatron-LM's core with Transformer Engine for any version's name."""
    for old, new in _OLD_NAMES:
        name = re.sub(old, new, name)
    return name


_FEW_GROUPS = 100_000


def check_tp(model: ModelConfig, tp: int, origin: str) -> None:
    """Raise ConfigError, with `origin`, if `tp` does not divide the sizes of a model."""
    for name, size in indivisible_sizes(model, tp):
        raise ConfigError(f"{origin}: {name} = {size} is not divisible by TP {tp}")


def check_fits(model: ModelConfig, ranks: Sequence[Mapping[str, Stored]], origin: str) -> None:
    """Raise an InputError, with `origin`, if the tensors of all ranks cannot contain a model.

    A layout has a part per key-value group; without this check, a model of more groups than the
    files have numbers would exhaust the memory before its first missing tensor is found.
    """
    check_features(model)
    check_tp(model, len(ranks), origin)
    found = sum(prod(t.shape) for tensors in ranks for t in tensors.values() if t.dtype in DTYPES)
    groups = model.num_hidden_layers * model.num_key_value_heads
    if groups > max(found, _FEW_GROUPS):
        raise CheckpointError(
            f"{origin}: contains {found} numbers, the model has {groups} key-value groups"
        )


def padded_vocabulary(model: ModelConfig, tp: int, divisible_by: int) -> int:
    """Return the rows of all ranks' embeddings."""
    return pad(model.vocab_size, divisible_by * tp)


def fused_tensors(model: ModelConfig, tp: int, rank: int, vocabulary: int) -> Iterator[Fused]:
    """Yield all tensors of a tensor-parallel rank in the order of the module tree.

    `vocabulary` is the padded size. `tp` must divide attention heads, key-value heads and
    feed-forward width.
    """
    plan = parameter_plan(model, tp)
    embedding = plan[EMBEDDING.name]
    yield _vocabulary("embedding.word_embeddings.weight", embedding, tp, rank, vocabulary)
    for layer in range(model.num_hidden_layers):
        yield from _layer(model, plan, layer, tp, rank)
    yield _single("decoder.final_layernorm.weight", plan[FINAL_NORM], tp, rank)
    if not model.tie_word_embeddings:
        yield _vocabulary("output_layer.weight", plan[HEAD.name], tp, rank, vocabulary)


def _layer(
    model: ModelConfig, plan: dict[str, ParamSpec], layer: int, tp: int, rank: int
) -> Iterator[Fused]:
    ours, theirs = f"model.layers.{layer}", f"decoder.layers.{layer}"
    attention, mlp = f"{theirs}.self_attention", f"{theirs}.mlp"

    def single(name: str, source: str) -> Fused:
        return _single(name, plan[f"{ours}.{source}.weight"], tp, rank)

    yield single(f"{attention}.linear_qkv.layer_norm_weight", "input_layernorm")
    heads = _heads(model, f"{ours}.self_attn", tp, rank)
    yield _stacked(f"{attention}.linear_qkv.weight", list(heads))
    yield single(f"{attention}.linear_proj.weight", "self_attn.o_proj")
    yield single(f"{mlp}.linear_fc1.layer_norm_weight", "post_attention_layernorm")
    halves = [plan[f"{ours}.mlp.{half}_proj.weight"] for half in ("gate", "up")]
    yield _stacked(f"{mlp}.linear_fc1.weight", [(s.name, _slice(s, tp, rank)) for s in halves])
    yield single(f"{mlp}.linear_fc2.weight", "mlp.down_proj")


def _slice(spec: ParamSpec, tp: int, rank: int) -> Block:
    rows, cols = spec.slice_shape(tp)
    return Block(range(rows), range(cols)).shifted(*spec.slice_origin(tp, rank))


def _single(name: str, spec: ParamSpec, tp: int, rank: int) -> Fused:
    block = _slice(spec, tp, rank)
    shape = (len(block.rows),) if spec.is_vector else (len(block.rows), len(block.cols))
    return Fused(name, shape, (TensorPart(spec.name, block, 0),))


def _stacked(name: str, blocks: list[tuple[str, Block]]) -> Fused:
    parts, row = [], 0
    for source, block in blocks:
        parts.append(TensorPart(source, block, row))
        row += len(block.rows)
    return Fused(name, (row, len(blocks[0][1].cols)), tuple(parts))


def _vocabulary(name: str, spec: ParamSpec, tp: int, rank: int, vocabulary: int) -> Fused:
    share = vocabulary // tp
    rows = range(min(rank * share, spec.rows), min((rank + 1) * share, spec.rows))
    parts = (TensorPart(spec.name, Block(rows, range(spec.cols)), 0),) if rows else ()
    return Fused(name, (share, spec.cols), parts)


def _heads(model: ModelConfig, name: str, tp: int, rank: int) -> Iterator[tuple[str, Block]]:
    """Yield the heads of a rank by key-value group."""
    groups, width = model.num_key_value_heads, model.head_dim
    queries = model.num_attention_heads // groups * width
    for group in range(rank * groups // tp, (rank + 1) * groups // tp):
        for kind, rows in (("q", queries), ("k", width), ("v", width)):
            block = Block(range(group * rows, (group + 1) * rows), range(model.hidden_size))
            yield f"{name}.{kind}_proj.weight", block
