"""Loss of a model on disk on a given text, with one layer in memory at a time."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagrow.checkpoint.source import Source
from megagrow.common.json_text import FILE_BYTES, read_limited
from megagrow.common.progress import PhaseProgress
from megagrow.common.sizes import format_bytes
from megagrow.config.schema import ModelConfig
from megagrow.errors import ConfigError, DataError
from megagrow.model.decoder import CausalLM
from megagrow.model.layers.costs import MicroBatch
from megagrow.model.layers.table import (
    EMBEDDING_MODULE,
    HEAD_MODULE,
    distinct_layers,
    module_names,
)
from megagrow.model.masks import Masks
from megagrow.reshard.layout import Block

SEQUENCE_LENGTH = 512
"""Maximum tokens per sequence."""


def text_tokens(text: Path, tokenizer: str, models: tuple[ModelConfig, ...]) -> list[Tensor]:
    """Return the text as sequences of token ids, each (1, S) int64, valid for all models."""
    from megagrow.data.tokenizers import check_tokenizer, load_tokenizer

    try:
        written = read_limited(text, FILE_BYTES, DataError).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{text}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{text}: not a UTF-8 text file (byte {error.start})") from error
    for model in models:
        check_tokenizer(tokenizer, model.vocab_size)
    (ids,) = load_tokenizer(tokenizer).encode_batch([written])
    if len(ids) < 2:
        raise DataError(f"{text}: {len(ids)} tokens; a loss needs at least 2")
    length = min(SEQUENCE_LENGTH, *(model.max_position_embeddings for model in models))
    parts = torch.tensor(ids)[None].split(length, dim=1)
    return [part for part in parts if part.shape[1] > 1]


def text_memory(model: ModelConfig, sequences: list[Tensor]) -> int:
    """Return the peak bytes of `text_loss`: a layer or an embedding, and its activations.

    The activations of training are an upper bound.
    """
    tokens = max(sequence.shape[1] for sequence in sequences)
    batch = MicroBatch(
        tokens=tokens,
        sequence_length=tokens,
        width=4,
        tp=1,
        attention="sdpa",
        pointwise="torch",
        scan="torch",
        checkpointing="none",
        on_cpu=True,
    )
    weights_and_activations = max(
        sum(4 * b.type.numel(model) + b.type.activation_bytes(model, batch) for b in blocks)
        for blocks in distinct_layers(model)
    )
    stream = 8 * model.hidden_size * tokens
    vocabulary = model.vocab_size * (model.hidden_size + 3 * tokens)
    return max(weights_and_activations + 4 * stream, 4 * vocabulary)


def check_text_memory(model: ModelConfig, sequences: list[Tensor], memory: int) -> None:
    """Raise ResourceError if the loss does not fit in `memory` bytes."""
    needed = text_memory(model, sequences)
    if needed > memory:
        raise ConfigError(
            f"--text: one layer and its outputs take {format_bytes(needed)}, --memory is "
            f"{format_bytes(memory)}: give more, or leave --text out"
        )


def text_loss(source: Source, sequences: list[Tensor], masks: Masks | None = None) -> float:
    """Return the mean loss per predicted token in nats; fp32, on the CPU.

    `masks` are the growth masks of parts that are still ramping.
    """
    with torch.device("meta"):
        model = CausalLM(source.model)
    _hold_while_used(model, source)
    total, count = 0.0, 0
    progress = PhaseProgress("text loss", len(sequences), "sequences")
    with torch.no_grad():
        for ids in sequences:
            positions = torch.arange(ids.shape[1])[None]
            logits = model(ids, positions, None, masks)[0, :-1]
            total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
            progress.advance()
    return total / count


def _hold_while_used(model: CausalLM, source: Source) -> None:
    """Load the weights of each module before its forward pass and release them after it."""
    for name in module_names(source.model):
        tied = name == HEAD_MODULE and source.model.tie_word_embeddings
        prefix = EMBEDDING_MODULE if tied else name
        module = model.get_submodule(name)
        module.register_forward_pre_hook(partial(_load, source, prefix))
        module.register_forward_hook(_unload)


def _load(source: Source, prefix: str, module: nn.Module, _: Any) -> None:
    weights = {name: _whole(source, f"{prefix}.{name}") for name, _ in module.named_parameters()}
    module.load_state_dict(weights, assign=True)


def _unload(module: nn.Module, _: Any, __: Any) -> None:
    module.to("meta")


def _whole(source: Source, name: str) -> Tensor:
    spec = source.layout.plan[name]
    values = source.read(name, "fp32", Block(range(spec.rows), range(spec.cols)))
    return values.squeeze(1) if spec.is_vector else values
