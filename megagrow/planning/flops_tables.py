"""FLOPs of a token by part of the model, by both accounts."""

from collections.abc import Mapping, Sequence

from megagrow.config.flops import (
    attention_parameters,
    mlp_parameters,
    paper_flops_per_token,
    parameters,
)
from megagrow.config.schema import ModelConfig
from megagrow.train.flops import attention_flops, flops_per_token

FlopsParts = Mapping[str, tuple[int, int]]
"""Part -> training FLOPs per token: really done, and by the paper's account."""


def flops_parts(model: ModelConfig, sequence_length: int) -> FlopsParts:
    """The parts, and "all" of them.

    Really done are the matrix products (`train.flops.flops_per_token`): looking a row of the
    embedding up costs none. The paper's account takes 6 for every parameter and none for
    attention itself; a tied table is one parameter there, and stands with the head.
    """
    projections = 6 * attention_parameters(model)
    mlp = 6 * mlp_parameters(model)
    table = 6 * model.vocab_size * model.hidden_size
    tables = table if model.tie_word_embeddings else 2 * table
    norms = 6 * parameters(model) - projections - mlp - tables
    return {
        "attention's projections": (projections, projections),
        "attention itself": (attention_flops(model, sequence_length), 0),
        "feed-forward": (mlp, mlp),
        "head": (table, table),
        "embedding": (0, tables - table),
        "norms": (0, norms),
        "all": (flops_per_token(model, sequence_length), paper_flops_per_token(model)),
    }


def flops_rows(models: Sequence[ModelConfig], sequence_length: int) -> Mapping[str, Sequence[str]]:
    """Part -> for each model FLOPs per token that are really done, their share of all, and what the
    paper's account says."""
    found = [flops_parts(model, sequence_length) for model in models]
    return {part: [_cell(parts, part) for parts in found] for part in found[0]}


def _cell(parts: FlopsParts, part: str) -> str:
    done, papers = parts[part]
    return f"{done:.3e} ({done / parts['all'][0]:.1%}) / {papers:.3e}"
