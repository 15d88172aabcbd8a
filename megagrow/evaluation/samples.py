"""Texts that the model in training generates after each validation."""

from functools import partial

import torch

from megagrow.config.schema import RunConfig, SamplesConfig
from megagrow.errors import ConfigError
from megagrow.evaluation.completion import Completer, CompletionOptions, read_prompts
from megagrow.evaluation.generation import GenerationDefaults, Sampling
from megagrow.evaluation.logprobs import ModelScorer
from megagrow.evaluation.stage_model import StageModel
from megagrow.evaluation.tokenizer import EvalTokenizer, open_tokenizer
from megagrow.model.masks import Masks
from megagrow.parallel.agreement import run_on_all_ranks, run_on_rank_zero
from megagrow.train.stage import Stage

Sample = dict[str, str]
"""{"prompt": text, "text": its continuation}."""


class TrainingSamples:
    """Completions of a run's prompts by the model in training, in place.

    The constructor and the calls are collective. The constructor raises InputError if the tokenizer
    or the prompts cannot be read, or if a prompt fills the context of a stage.
    """

    def __init__(self, run: RunConfig, config: SamplesConfig) -> None:
        self._prompts = run_on_rank_zero(partial(prompts_of, config))
        self._tokenizer = run_on_all_ranks(partial(tokenizer_for, self._prompts, run))
        sampling = Sampling(config.temperature > 0, config.temperature, config.top_k, config.top_p)
        self._options = CompletionOptions(config.max_tokens, sampling, seed=abs(run.seed))

    @torch.no_grad()
    def __call__(self, stage: Stage, masks: Masks | None) -> list[Sample]:
        """Return a continuation of each prompt. All data-parallel ranks compute all of them."""
        stage.engine.train(False)
        scorer = ModelScorer(StageModel(stage, masks), stage.topology)
        length = stage.config.model.max_position_embeddings
        defaults = GenerationDefaults()
        completer = Completer(scorer, self._tokenizer, defaults, length, self._options)
        texts = completer.complete(self._prompts)
        scorer.finish()
        stage.engine.train()
        return [
            {"prompt": prompt, "text": text}
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]


def prompts_of(config: SamplesConfig) -> list[str]:
    """Return the prompts of a run. Raises DataError if their file cannot be read."""
    given = config.prompts
    return given if isinstance(given, list) else read_prompts(given)


def tokenizer_for(prompts: list[str], run: RunConfig) -> EvalTokenizer:
    """Open the tokenizer of a run.

    Raises InputError if it cannot be read, or if a prompt fills the context of a stage.
    """
    tokenizer = open_tokenizer(str(run.data.tokenizer), run.stages[0].model.vocab_size)
    shortest = min(stage.model.max_position_embeddings for stage in run.stages)
    for prompt in prompts:
        count = len(tokenizer.encode(prompt))
        if count >= shortest:
            raise ConfigError(
                f"samples.prompts: {prompt[:40]!r} has {count} tokens, but the shortest context "
                f"length of a stage is {shortest}; shorten the prompt"
            )
    return tokenizer
