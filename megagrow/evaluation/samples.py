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
        given = config.prompts
        self._prompts = run_on_rank_zero(
            lambda: given if isinstance(given, list) else read_prompts(given)
        )
        self._tokenizer = run_on_all_ranks(
            partial(open_tokenizer, str(run.data.tokenizer), run.stages[0].model.vocab_size)
        )
        sampling = Sampling(config.temperature > 0, config.temperature, config.top_k, config.top_p)
        self._options = CompletionOptions(config.max_tokens, sampling, seed=abs(run.seed))
        shortest = min(stage.model.max_position_embeddings for stage in run.stages)
        run_on_all_ranks(partial(_check_lengths, self._prompts, self._tokenizer, shortest))

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


def _check_lengths(prompts: list[str], tokenizer: EvalTokenizer, context_length: int) -> None:
    for prompt in prompts:
        count = len(tokenizer.encode(prompt))
        if count >= context_length:
            raise ConfigError(
                f"samples.prompts: {prompt[:40]!r} has {count} tokens, but the shortest context "
                f"length of a stage is {context_length}; shorten the prompt"
            )
