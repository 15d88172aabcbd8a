"""Parameter counts and FLOPs per token, from the declarations of the layer types.

Two accounts of training FLOPs exist. `paper_flops_per_token` is that of the papers on growth;
speedups are measured by it. `flops_per_token` counts the matrix products that are computed; model
FLOPs utilization (MFU) is measured by it.
"""

from megagrow.config.schema import ModelConfig
from megagrow.model.layers import table


def parameters(model: ModelConfig) -> int:
    """Return the number of parameters; a tied embedding counts once."""
    tables = 1 if model.tie_word_embeddings else 2
    return non_embedding_parameters(model) + tables * table.EMBEDDING.numel(model)


def non_embedding_parameters(model: ModelConfig) -> int:
    """Return the number of parameters without embedding and head: the N of the papers."""
    return block_parameters(model) + norm_parameters(model)


def block_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of the blocks of all decoder layers, without their norms."""
    blocks = table.block_counts(model).items()
    return sum(count * block.type.numel(model) for block, count in blocks)


def norm_parameters(model: ModelConfig) -> int:
    """Return the number of parameters of all norms outside the blocks."""
    norms = table.block_counts(model).total() + 1
    return norms * table.norm_gain(table.FINAL_NORM).numel(model)


def paper_flops_per_token(model: ModelConfig) -> int:
    """Return the training FLOPs per token by the account of the papers on growth.

    It is 6 times all parameters, embeddings included and attention scores excluded (Du et al. 2024,
    section 4).
    """
    return 6 * parameters(model)


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Return the training FLOPs per token of all matrix products, at a sequence length.

    An embedding lookup takes none. Activation checkpointing is not counted.
    """
    return matmul_flops(model) + score_flops(model, sequence_length)


def matmul_flops(model: ModelConfig) -> int:
    """Return the training FLOPs per token of products with weights: 6 per matrix element."""
    blocks = table.block_counts(model).items()
    layers = sum(count * block.type.matmul_flops(model) for block, count in blocks)
    return layers + table.HEAD.matmul_flops(model)


def score_flops(model: ModelConfig, sequence_length: int) -> int:
    """Return the training FLOPs per token of products between activations, such as q k^T."""
    blocks = table.block_counts(model).items()
    return sum(count * block.type.score_flops(model, sequence_length) for block, count in blocks)
