"""A small model and one that has grown from it, with numbers that are exact by no luck."""

from typing import Any

import torch
from torch import Tensor

from megagrow.config.schema import ModelConfig
from megagrow.model.decoder import CausalLM

HEADS = {"mha": (2, 1), "gqa": (2, 2), "mqa": (1, 4)}
"""Key/value heads, and query heads for each of them."""


def model_config(groups: int, each: int, **changes: Any) -> ModelConfig:
    values = {
        "num_hidden_layers": 2,
        "hidden_size": 9,
        "num_attention_heads": groups * each,
        "num_key_value_heads": groups,
        "head_dim": 4,
        "intermediate_size": 11,
        "vocab_size": 13,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-2,
    }
    return ModelConfig.model_validate(values | changes)


def grown_pair(heads: str = "gqa", tied: bool = False) -> tuple[ModelConfig, ModelConfig]:
    groups, each = HEADS[heads]
    source = model_config(groups, each, tie_word_embeddings=tied)
    wider = {"num_hidden_layers": 3, "hidden_size": 14, "intermediate_size": 18}
    return source, model_config(groups + 1, each, tie_word_embeddings=tied, **wider)


def random_model(config: ModelConfig, seed: int, std: float = 1.0) -> CausalLM:
    """fp64; gains as large as all else."""
    model = CausalLM(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(std * noise)
    return model


def grown_model(source: CausalLM, target: ModelConfig) -> CausalLM:
    """The source's numbers at the front of every axis, large random ones everywhere else."""
    model, old = random_model(target, seed=1, std=3.0), dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in old:
                parameter[tuple(slice(size) for size in old[name].shape)] = old[name]
    return model


def gentle_model(source: ModelConfig, target: ModelConfig) -> CausalLM:
    """As `grown_model`, with numbers so small that no softmax is near to 0 or 1."""
    model = grown_model(random_model(source, seed=0), target)
    for parameter in model.parameters():
        parameter.data.mul_(0.2)
    return model


def every_token(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Ids and positions, each (3, 13): the whole vocabulary, in three orders."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(config.vocab_size, generator=generator) for _ in range(3)])
    return ids, torch.arange(config.vocab_size).expand_as(ids)
