"""How much a model computes, by two accounts.

`config.parameters.paper_flops_per_token` is the account of the papers on growth, by which speedups
are measured. `flops_per_token` here counts the matrix products that are really done; utilisation
(MFU) is measured by it.
"""

from megagrow.config.flops import matmul_parameters
from megagrow.config.schema import ModelConfig, RunConfig
from megagrow.config.stage_length import stage_tokens


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Training FLOPs per token: 6 per matrix weight, and attention over `sequence_length`."""
    return 6 * matmul_parameters(model) + attention_flops(model, sequence_length)


def attention_flops(model: ModelConfig, sequence_length: int) -> int:
    """Training FLOPs per token of q k^T and of the weighted sum of v, in all layers.

    Each takes 2 heads head_dim FLOPs for every position seen, forward, and twice that backward:
    12 L heads head_dim per position (PaLM, arXiv 2204.02311, appendix B; Chinchilla, arXiv
    2203.15556, appendix F). They count all S positions; a causal kernel sees (S + 1) / 2 on
    average, which is what is counted here. Work done twice by activation checkpointing is not
    counted.
    """
    width = model.num_attention_heads * model.head_dim
    return 6 * model.num_hidden_layers * width * (sequence_length + 1)


def run_flops(run: RunConfig) -> int:
    """FLOPs of the whole run, as `flops_per_token` counts them."""
    length = run.data.sequence_length
    return sum(stage_tokens(s, length) * flops_per_token(s.model, length) for s in run.stages)
