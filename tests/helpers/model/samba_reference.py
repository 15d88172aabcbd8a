"""Samba (Ren et al. 2024) composed of the parts of transformers: MambaMixer, MistralAttention with
a window, MistralMLP and RMSNorms, with a tied head.

Modules have our names. The exceptions are those of MambaMixer: its `in_proj` holds our `in_proj`
and `gate_proj`, and its convolution has a dimension of one input per channel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MambaConfig, MistralConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralMLP,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)

from megagrow.config.schema import ModelConfig
from megagrow.parallel.sharding import parameter_plan


def samba(**changes: Any) -> ModelConfig:
    """Return a small hybrid of two periods, with no default where a mistake could hide: grouped
    queries, a window shorter than the sequences of the tests, channels not twice the width."""
    values = {
        "model_type": "samba",
        "num_hidden_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 24,
        "vocab_size": 37,
        "max_position_embeddings": 64,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-3,
        "sliding_window": 5,
        "mamba_d_inner": 24,
        "mamba_d_state": 3,
        "mamba_d_conv": 4,
        "mamba_dt_rank": 2,
        "tie_word_embeddings": True,
    }
    return ModelConfig.model_validate(values | changes)


def drawn(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return weights far from any symmetry, in the shapes of our modules, fp32."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, spec in parameter_plan(config, tp=1).items():
        shape = (spec.rows,) if spec.is_vector else (spec.rows, spec.cols)
        noise = torch.randn(shape, generator=generator)
        found[name] = 1 + 0.3 * noise if spec.is_vector else noise * spec.cols**-0.5
    return found


def mixer_of(config: ModelConfig) -> MambaMixer:
    """Return the mixer of transformers, which runs its path in torch on a CPU."""
    theirs = MambaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.mamba_d_inner,
        state_size=config.mamba_d_state,
        conv_kernel=config.mamba_d_conv,
        time_step_rank=config.mamba_dt_rank,
        num_hidden_layers=1,
    )
    theirs.intermediate_size = config.mamba_d_inner
    return MambaMixer(theirs, 0)


class ReferenceLayer(nn.Module):
    """A mixer and a feed-forward block, each after a norm."""

    def __init__(self, config: ModelConfig, theirs: MistralConfig, index: int) -> None:
        super().__init__()
        self.is_mamba = config.layer_type(index) == "mamba"
        if self.is_mamba:
            self.mamba = mixer_of(config)
        else:
            self.self_attn = MistralAttention(theirs, index)
        self.mlp = MistralMLP(theirs)
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.add_module(name, MistralRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Tensor, rotations: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        norm = self.input_layernorm(x)
        x = x + (self.mamba(norm) if self.is_mamba else self.self_attn(norm, rotations, mask)[0])
        return x + self.mlp(self.post_attention_layernorm(x))


class SambaReference(nn.Module):
    """Token ids (B, S) to logits (B, S, V)."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        super().__init__()
        names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        names += ("intermediate_size", "rms_norm_eps", "max_position_embeddings")
        theirs = MistralConfig(
            **{name: getattr(config, name) for name in names},
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",
        )
        self.config, self.rotary = config, MistralRotaryEmbedding(theirs)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(
            ReferenceLayer(config, theirs, index) for index in range(config.num_hidden_layers)
        )
        self.model.norm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps)
        with torch.no_grad():
            for name, weight in weights.items():
                part_of(name, self.get_parameter).copy_(weight)

    def forward(self, ids: Tensor) -> Tensor:
        x, length = self.model.embed_tokens(ids), ids.shape[1]
        rotations = self.rotary(x, torch.arange(length)[None])
        reached = torch.ones(length, length, dtype=torch.bool).tril()
        reached &= ~reached.tril(-self.config.sliding_window)
        mask = torch.zeros(length, length).masked_fill(~reached, -torch.inf)[None, None]
        for layer in self.model.layers:
            x = layer(x, rotations, mask)
        return self.model.norm(x) @ self.model.embed_tokens.weight.T

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by our names, in the shapes of our modules."""
        names = parameter_plan(self.config, tp=1)
        return {name: part_of(name, self._gradient) for name in names}

    def _gradient(self, name: str) -> Tensor:
        gradient = self.get_parameter(name).grad
        assert gradient is not None
        return gradient


def part_of(name: str, theirs: Callable[[str], Tensor]) -> Tensor:
    """Return our parameter as a view of theirs, which `theirs` returns by its name."""
    if name.endswith("mamba.in_proj.weight"):
        return theirs(name).chunk(2)[0]
    if name.endswith("mamba.gate_proj.weight"):
        return theirs(name.replace("gate_proj", "in_proj")).chunk(2)[1]
    if name.endswith("mamba.conv1d.weight"):
        return theirs(name)[:, 0]
    return theirs(name)
