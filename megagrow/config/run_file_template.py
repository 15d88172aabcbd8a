"""`megagrow init`: a commented run file for a corpus and a model size."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megagrow.common.sizes import format_count
from megagrow.config.growth_guidelines import MOST_FACTOR, best_batch, rate_for_size
from megagrow.config.schema import ModelConfig
from megagrow.errors import ConfigError
from megagrow.model.layers.flops import non_embedding_parameters, parameters

HEAD_DIMS = ((512, 32), (2048, 64), (math.inf, 128))
"""(Hidden sizes below, head_dim); a hidden size is a multiple of it."""
LAYERS = range(8, 33, 4)
"""Layers of the grown model: multiples of the growth factor, with a base of at least two."""
WIDTHS_PER_LAYER = (8, 128)
"""Hidden size / layers; the demo has 16, published models have 40 (410M) to 128 (7B)."""
LARGEST = 8e9
"""Parameters; larger models need a layout for their cluster (docs/guides/recipes.md)."""

TOKENS_PER_PARAMETER = 20
"""Compute-optimal training (Hoffmann et al. 2022, arXiv 2203.15556)."""
MOST_EPOCHS = 4
"""Repetitions of a corpus that are nearly as good as new text (Muennighoff et al. 2023, arXiv
2305.16264)."""
BASE_SHARE = 0.2
"""Share of the tokens before the growth. The paper's runs have 1% to 10%, of 1,000 times as many
tokens; its equation 2 asks for larger shares of shorter runs."""
HIGHEST_RATE = 2e-3
"""Limit of the learning rates that are extrapolated to small models; the best one of the demo."""
SEQUENCE_LENGTHS = ((30e6, 256), (300e6, 1024), (math.inf, 2048))
"""(Largest number of parameters, sequence length)."""
VALIDATION_TOKENS = 10**6


@dataclass(frozen=True)
class PreparedCorpus:
    """Corpus written by `megagrow prepare`."""

    folder: Path
    tokenizer: str
    """File in the folder."""
    vocab_size: int
    tokens: int
    """Number of training tokens."""
    validation_tokens: int
    """0 without validation documents."""


@dataclass(frozen=True)
class StartingPoint:
    """Values of a run file that depend on the corpus and the size."""

    model: ModelConfig
    tokens: int
    """Tokens of both stages together."""
    sequence_length: int
    sequences: int
    """Sequences per optimizer step."""
    lr: float


def starting_point(corpus: PreparedCorpus, size: int, tokens: int | None) -> StartingPoint:
    """Choose a model with about `size` parameters, and its training.

    `tokens` is the length of the run; None for 20 per parameter, at most 4 epochs of the corpus.
    """
    length = next(length for limit, length in SEQUENCE_LENGTHS if size <= limit)
    model = closest_model(size, corpus.vocab_size, length)
    if tokens is None:
        tokens = min(TOKENS_PER_PARAMETER * parameters(model), MOST_EPOCHS * corpus.tokens)
    batch = best_batch(non_embedding_parameters(model), tokens) / length
    sequences = 2 ** max(3, round(math.log2(batch)))
    lr = min(HIGHEST_RATE, rate_for_size(parameters(model)))
    return StartingPoint(model, tokens, length, sequences, float(f"{lr:.1g}"))


def closest_model(size: int, vocab_size: int, sequence_length: int) -> ModelConfig:
    """Return the Llama model whose number of parameters has the closest ratio to `size`.

    Of equally close ones, it has the fewest layers. Raises ConfigError if none is within a quarter.
    """
    candidates = [
        _llama(layers, width, vocab_size, sequence_length)
        for layers in LAYERS
        for width in range(WIDTHS_PER_LAYER[0] * layers, WIDTHS_PER_LAYER[1] * layers + 1)
        if width % _head_dim(width) == 0
    ]
    best = min(candidates, key=lambda model: abs(math.log(parameters(model) / size)))
    if not 0.75 <= parameters(best) / size <= 1.25 or size > LARGEST:
        raise ConfigError(
            f"--size {format_count(size)}: no model of this size with a vocabulary of "
            f"{vocab_size:,}; the closest has {parameters(best):,} parameters, the largest "
            f"{LARGEST:.0e}"
        )
    return best


def _head_dim(width: int) -> int:
    return next(size for limit, size in HEAD_DIMS if width < limit)


def _llama(layers: int, width: int, vocab_size: int, sequence_length: int) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // _head_dim(width),
        intermediate_size=64 * math.ceil(width * 8 / 3 / 64),
        vocab_size=vocab_size,
        max_position_embeddings=sequence_length,
    )


def run_file(corpus: PreparedCorpus, size: int, tokens: int | None, name: str) -> str:
    """Return the text of a run file that trains and grows a model on a prepared corpus.

    Args:
        size: approximate number of parameters of the grown model.
        tokens: length of the run, see `starting_point`.
        name: name of the run.

    Raises ConfigError if there is no model of this size.
    """
    return TEMPLATE.format(**_values(corpus, starting_point(corpus, size, tokens), name))


def _values(corpus: PreparedCorpus, point: StartingPoint, name: str) -> dict[str, Any]:
    model, step = point.model, point.sequences * point.sequence_length
    steps = max(2, point.tokens // step)
    base = max(1, round(BASE_SHARE * steps))
    folder, validates = corpus.folder, corpus.validation_tokens > 0
    return {
        "name": _scalar(name),
        "output_dir": _scalar(f"runs/{name}"),
        "train": _scalar(folder / "train"),
        "tokenizer": _scalar(folder / corpus.tokenizer),
        "validation": f"[{{path: {_scalar(folder / 'validation')}}}]" if validates else "[]",
        "corpus_tokens": f"{corpus.tokens:,}",
        "epochs": f"{steps * step / corpus.tokens:.2g}",
        "sequence_length": point.sequence_length,
        "sequences": point.sequences,
        "micro_batch": min(point.sequences, 8),
        "step_tokens": f"{step:,}",
        "lr": f"{point.lr:.0e}",
        "min_lr": f"{point.lr / 10:.0e}",
        "warmup": max(1, min(2000, base // 10)),
        "interval": max(1, steps // 20),
        "validation_tokens": min(VALIDATION_TOKENS, corpus.validation_tokens) or step,
        "parameters": f"{parameters(model):,}",
        "base_layers": model.num_hidden_layers // MOST_FACTOR,
        "base_tokens": format_count(base * step),
        "rest_tokens": format_count((steps - base) * step),
        **model.model_dump(),
    }


def _scalar(text: str | Path) -> str:
    """Return a text as a YAML scalar, quoted if necessary."""
    listed = yaml.safe_dump(
        [str(text)], default_flow_style=True, allow_unicode=True, width=math.inf
    )
    return listed.strip().removeprefix("[").removesuffix("]")


TEMPLATE = """\
# {parameters} parameters, grown from {base_layers} to {num_hidden_layers} layers during the run.
# Written by `megagrow init`; all keys: docs/reference/configuration.md.
name: {name}
output_dir: {output_dir}   # checkpoints, metrics.jsonl; the same command again resumes

data:
  # Prefixes of .bin and .idx files; several are blended: [{{path: A, weight: 2}}, {{path: B}}].
  train: [{{path: {train}}}]   # {corpus_tokens} tokens; this run reads {epochs} epochs
  validation: {validation}
  tokenizer: {tokenizer}
  sequence_length: {sequence_length}

# Sequences per optimizer step over all ranks ({step_tokens} tokens), and per pass of a rank.
batch: {{global_batch_size: {sequences}, micro_batch_size: {micro_batch}}}
# ZeRO: 0 shards nothing, 1 optimizer state, 2 also gradients, 3 also weights, over the ranks.
parallel: {{zero_stage: 1, tensor_model_parallel_size: 1}}
optimizer: {{lr: {lr}, min_lr: {min_lr}}}
schedule: {{type: cosine, warmup_steps: {warmup}}}
checkpoint: {{interval: {interval}}}   # steps
validation: {{interval: {interval}, tokens: {validation_tokens}}}
# Texts generated every `validation.interval` steps (needs `pip install 'megagrow[hf]'`):
# samples: {{prompts: ["Once upon a time"], max_tokens: 48}}

# Keys of a stage that are set above are defaults of all stages.
stages:
  - model: &model
      num_hidden_layers: {base_layers}
      hidden_size: {hidden_size}
      num_attention_heads: {num_attention_heads}
      intermediate_size: {intermediate_size}
      vocab_size: {vocab_size}
      max_position_embeddings: {max_position_embeddings}
    tokens: {base_tokens}
  - model: {{<<: *model, num_hidden_layers: {num_hidden_layers}}}
    tokens: {rest_tokens}
    growth:
      operator: direct_depth      # Gstack: repeat the layers of the previous stage
      optimizer_state: transport  # Adam's moments move with the weights
"""
