"""Hugging Face's models as the measure of ours: same weights in, logits and gradients out."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megagrow.config.model import FEATURE_KEYS, MAMBA_KEYS
from megagrow.config.schema import ModelConfig
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.formats.hugging_face_tokenizer import tokenizer_files
from tests.helpers.reshard.definition import State, random_state

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-3,
}
"""No default is left where a mistaken one could hide; the vocabulary is a prime."""


def tiny(**changes: Any) -> ModelConfig:
    """A small model config; `changes` are fields of ModelConfig."""
    return ModelConfig(**TINY | changes)


WITH_LAYER_TYPES = ("qwen2", "qwen3")


def hugging_face(config: ModelConfig, seed: int = 0) -> PreTrainedModel:
    """Their model of our config, fp32 and eager, with weights far from any symmetry."""
    fields = config.model_dump(exclude={*FEATURE_KEYS, *MAMBA_KEYS, "rope_theta", "rope_scaling"})
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= config.rope_scaling.given()
    types = [config.layer_type(layer) for layer in range(config.num_hidden_layers)]
    fields |= {"layer_types": types} if config.model_type in WITH_LAYER_TYPES else {}
    fields |= {"use_sliding_window": True} if config.sliding_window else {}
    fields["pad_token_id"] = None  # whose row of the embedding has no gradient
    made = AutoConfig.for_model(**fields, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = parameter.dim() == 1  # or a bias: the mean does not matter
            parameter.copy_(1 + 0.3 * noise if gain else noise * parameter.shape[1] ** -0.5)
    return model


def tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random input ids and labels, each (batch, length) int64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, length)
    return tuple(torch.randint(config.vocab_size, shape, generator=generator))


def outcome(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
    """Logits (B, S, V), and by parameter the gradient of the mean cross-entropy of all labels."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def state_of(model: torch.nn.Module, plan: dict) -> State:
    """The weights of their model as a state of ours, with random moments."""
    state = random_state(plan)
    found = model.state_dict()
    for name, spec in plan.items():
        state[name]["fp32"] = found[name].view(spec.rows, spec.cols).clone()
    return state


def chat_folder(folder: Path, config: ModelConfig | None = None) -> Path:
    """A folder with all files of a chat model (vocabulary 301), and keys that name code."""
    hugging_face(config or tiny(vocab_size=301)).save_pretrained(folder)
    model = folder / "tokenizer.model"
    train_sentencepiece(["a small model grows into a large one\n" * 20], 280, model)
    settings = tokenizer_files(model, 301).documents
    ids = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}
    changes = {
        "config.json": ids
        | {"auto_map": {"AutoConfig": "evil.Evil"}, "custom_pipelines": {"x": {"impl": "e.E"}}},
        "generation_config.json": ids
        | {"do_sample": True, "temperature": 0.5, "custom_generate": "someone/code"},
        "tokenizer.json": settings["tokenizer.json"],
        "tokenizer_config.json": settings["tokenizer_config.json"]
        | {"chat_template": "{{ messages }}", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    }
    for name, values in changes.items():
        path = folder / name
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | values))
    (folder / "README.md").write_text("---\nlicense: other\n---\n# A model \u4f60\n")
    (folder / "LICENSE").write_text("Terms")
    (folder / "evil.py").write_text("raise SystemExit")
    return folder


OLD = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 101,
    "rope_theta": 123.0,
    "model_type": "llama",
}
"""config.json of a Llama as transformers 4 writes it, without the fields that have defaults."""

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
