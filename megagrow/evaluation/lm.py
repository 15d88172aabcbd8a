"""Model interface of lm-eval, registered under the name `megagrow`.

Texts are encoded as by lm-eval's Hugging Face model. Data-parallel ranks share the requests of a
call and exchange the answers inside it, so each rank runs lm-eval as a single process.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megagrow.common.progress import PhaseProgress
from megagrow.errors import ConfigError, DataError, InputError
from megagrow.evaluation.generation import Generation, GenerationDefaults, StopString, generate
from megagrow.evaluation.generation_options import GenerationOptions, read_options
from megagrow.evaluation.launched import init_topology
from megagrow.evaluation.likelihood import Pair, log_likelihoods
from megagrow.evaluation.logprobs import ModelScorer, TokenScorer
from megagrow.evaluation.model import LoadedModel, load_model
from megagrow.evaluation.tokenizer import EvalTokenizer
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.process_groups import Topology

logger = logging.getLogger(__name__)

SEED = 1234
"""Default seed of sampled texts; lm-eval's default."""

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")


class LMAdapter(TemplateLM):  # type: ignore[misc]
    """Adapter from a `TokenScorer` to lm-eval. All methods are collective over all ranks."""

    def __init__(
        self,
        scorer: TokenScorer,
        tokenizer: EvalTokenizer,
        topology: Topology,
        max_length: int,
        batch_size: int,
        defaults: GenerationDefaults | None = None,
        seed: int = SEED,
    ) -> None:
        super().__init__()
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._topology = topology
        self.max_length = max_length
        self.batch_size = batch_size
        self._defaults = defaults or GenerationDefaults()
        self._seed = seed
        self._warned: set[str] = set()

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.prefix_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self._tokenizer.encode(string, add_special_tokens)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Call lm-eval's method without its progress bar, which completes before the first pass.

        Raises DataError if a context or a continuation has no tokens.
        """
        for context, continuation in (request.args for request in requests):
            if not context and not self.tok_encode(continuation, add_special_tokens=False):
                raise _no_tokens(context, continuation)
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        return self._distribute([request.args[0] for request in requests], self._score_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the generated texts.

        Options have the meaning they have for lm-eval's Hugging Face model. Raises ConfigError for
        options that are not supported or do not fit the context length.
        """
        arguments = [(number, *request.args) for number, request in enumerate(requests)]
        return self._distribute(arguments, self._generate)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        for texts, context, continuation in requests:
            if not context or not continuation:
                raise _no_tokens(*texts)
        return self._distribute([(context, rest) for _, context, rest in requests], self._score)

    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        return log_likelihoods(pairs, self._scorer, self.max_length, self.batch_size)

    def _score_rolling(self, strings: list[str]) -> list[float]:
        windows = [self._windows(string) for string in strings]
        scores = iter(self._score([pair for pairs in windows for pair in pairs]))
        return [sum(next(scores)[0] for _ in pairs) for pairs in windows]

    def _windows(self, string: str) -> list[Pair]:
        windows = get_rolling_token_windows(
            self.tok_encode(string), self.prefix_token_id, self.max_length, context_len=1
        )
        return [make_disjoint_window(window) for window in windows]

    def _generate(self, requests: list[tuple[int, str, dict[str, Any]]]) -> list[str]:
        texts = [self._make_generation(*request) for request in requests]
        eos_ids = self._defaults.eos_ids | {self._tokenizer.eos_id}
        order = sorted(texts, key=lambda text: -len(text.prompt))
        progress = PhaseProgress("evaluation", len(texts), "texts")
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            generate(batch, self._scorer, self._tokenizer, eos_ids)
            progress.advance(len(batch))
        return [text.text(self._tokenizer) for text in texts]

    def _make_generation(self, number: int, context: str, given: dict[str, Any]) -> Generation:
        eos = self._tokenizer.decode([self._tokenizer.eos_id], special=True)
        options = read_options(given, eos, self._defaults)
        self._warn(options.warnings)
        if options.max_tokens >= self.max_length:
            raise ConfigError(
                f"max_gen_toks = {options.max_tokens} is not less than the context length "
                f"{self.max_length} of the model; set a smaller max_gen_toks"
            )
        ids = self.tok_encode(context)[-(self.max_length - options.max_tokens) :]
        prompt = ids or [self.prefix_token_id]
        sampler = options.sampling.sampler((self._seed, number))
        stops = tuple(StopString.of(stop, self._tokenizer) for stop in options.stop_strings)
        return Generation(prompt, self._new_tokens(options, len(prompt)), stops, sampler)

    def _new_tokens(self, options: GenerationOptions, prompt: int) -> int:
        """Return the maximum number of generated tokens after a prompt of `prompt` tokens."""
        if options.max_length is None:
            return options.max_tokens
        if not prompt < options.max_length <= self.max_length:
            raise ConfigError(
                f"max_length = {options.max_length} for a prompt of {prompt} tokens and a context "
                f"length of {self.max_length}: must be more than the prompt and at most the context"
            )
        return options.max_length - prompt

    def _warn(self, warnings: tuple[str, ...]) -> None:
        """Log each warning once, on rank 0."""
        for warning in warnings:
            if self._topology.rank == 0 and warning not in self._warned:
                self._warned.add(warning)
                logger.warning("generation: %s", warning)

    def _distribute(
        self, requests: list[RequestT], answer: Callable[[list[RequestT]], list[AnswerT]]
    ) -> list[AnswerT]:
        """Return the answers to all requests on all ranks.

        Each answer is computed by one data-parallel rank.
        """
        dp, dp_rank = self._topology.dp, self._topology.dp_rank
        bounds = [len(requests) * part // dp for part in range(dp + 1)]
        part = requests[bounds[dp_rank] : bounds[dp_rank + 1]]
        if dp == 1:
            return self._finish_after(answer, part)
        own = run_on_all_ranks(lambda: self._finish_after(answer, part))
        parts: list[Any] = [None] * dp
        dist.all_gather_object(parts, own, group=self._topology.dp_group)
        return [one for part in parts for one in part]

    def _finish_after(
        self, answer: Callable[[list[RequestT]], list[AnswerT]], requests: list[RequestT]
    ) -> list[AnswerT]:
        """Return the answers after all ranks are done, also if this rank fails.

        Under ZeRO-3 every rank takes part in every pass.
        """
        try:
            answers = answer(requests)
        except InputError:
            self._scorer.finish()
            raise
        self._scorer.finish()
        return answers


def _no_tokens(context: str, continuation: str) -> DataError:
    """Return the error of a log-likelihood request that is not a next-token prediction."""
    return DataError(
        f"the log-likelihood of {continuation[:40]!r} after {context[-40:]!r} has no tokens "
        "to predict or none to predict them from; remove the empty text from the task"
    )


def wrap_model(loaded: LoadedModel, topology: Topology, batch_size: int) -> LMAdapter:
    """Build the lm-eval adapter of a loaded model."""
    length = loaded.model.config.max_position_embeddings
    scorer = ModelScorer(loaded, topology)
    return LMAdapter(scorer, loaded.tokenizer, topology, length, batch_size, loaded.generation)


@register_model("megagrow")
class MegagrowLM(LMAdapter):
    """Model opened by path.

    The path is a checkpoint in any layout, a run directory (newest checkpoint) or a Hugging Face
    folder. Raises InputError as `load_model`, and if `batch_size` is not a positive integer.
    `device` is ignored, because lm-eval's command line always passes the first GPU: each rank uses
    its own GPU, or the CPU if there is none.
    """

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        tp: int = 1,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = SEED,
    ) -> None:
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size = {batch_size} is not a positive number of sequences")
        if not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed = {seed!r}: must be an integer of at least 0")
        topology = init_topology(tp)
        loaded = load_model(Path(checkpoint), topology, tokenizer, dtype)
        length = loaded.model.config.max_position_embeddings
        scorer = ModelScorer(loaded, topology)
        super().__init__(
            scorer, loaded.tokenizer, topology, length, int(batch_size), loaded.generation, seed
        )
