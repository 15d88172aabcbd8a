"""How many parameters a model has, and what a token of training costs by the paper's account."""

from megagrow.config.schema import ModelConfig


def parameters(model: ModelConfig) -> int:
    """Number of parameters; a tied embedding counts once."""
    tables = 1 if model.tie_word_embeddings else 2
    return non_embedding_parameters(model) + tables * model.vocab_size * model.hidden_size


def non_embedding_parameters(model: ModelConfig) -> int:
    """Parameters of the layers and the last norm, without embedding and head: the paper's N."""
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    return matmul_parameters(model) - model.vocab_size * model.hidden_size + norms


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that multiply every token: the layers' matrices and the head, no norms."""
    matrices = attention_parameters(model) + mlp_parameters(model)
    return matrices + model.vocab_size * model.hidden_size


def attention_parameters(model: ModelConfig) -> int:
    """Of the projections to q, k, v and back, of all layers."""
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    return model.num_hidden_layers * heads * model.head_dim * model.hidden_size


def mlp_parameters(model: ModelConfig) -> int:
    """Of gate, up and down, of all layers."""
    return 3 * model.num_hidden_layers * model.hidden_size * model.intermediate_size


def paper_flops_per_token(model: ModelConfig) -> int:
    """Training FLOPs per token by the account of the papers on growth: 6 times all parameters,
    embeddings in, attention out (Du et al. 2024, section 4)."""
    return 6 * parameters(model)
