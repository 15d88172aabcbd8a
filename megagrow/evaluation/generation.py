"""Generated texts: settings of a model, sampling, stop strings, and the loop over a batch.

Filters of the distribution are those of transformers. Each sampled text has its own generator of
random numbers: it depends on neither the batch nor the number of ranks, up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megagrow.evaluation.decoder import TokenChoice
from megagrow.evaluation.logprobs import TokenScorer
from megagrow.evaluation.tokenizer import EvalTokenizer

STOP_LOOKBACK = 2
"""Tokens searched for a stop string in addition to the number of its own tokens, as in lm-eval: the
model may generate the string as other tokens than the tokenizer encodes it."""


_OF_REQUESTS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "use_cache", "max_length"),
    *("max_new_tokens", "cache_implementation", "transformers_version", "_from_model_config"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
)
"""Keys of a generation_config.json that requests override or that do not change the tokens."""


@dataclass(frozen=True)
class GenerationDefaults:
    """Generation settings of a model, from its generation_config.json."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of requests that do not set them."""
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end a text in addition to the tokenizer's."""

    @classmethod
    def of(cls, generation: Mapping[str, Any]) -> "GenerationDefaults":
        """Read the content of a generation_config.json; keys unknown to transformers are ignored.

        An option that is not supported is refused by `generation_options.read_options`.
        """
        ids = generation.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        known = vars(GenerationConfig()).keys() - {*_OF_REQUESTS}
        return cls(
            {key: value for key, value in generation.items() if key in known},
            frozenset(each for each in ids if isinstance(each, int)),
        )


@dataclass(frozen=True)
class Sampling:
    """Choice of a token from its distribution; the defaults are greedy decoding."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    """Number of most likely tokens to choose from; 0 for all."""
    top_p: float = 1.0
    """Choose from the most likely tokens that together have this probability; 1 for all."""
    min_p: float = 0.0
    """Minimum probability of a token, relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Divisor of the positive logits, and factor of the negative logits, of tokens in the text."""

    @property
    def reads_logits(self) -> bool:
        """Return False if the most likely token is chosen."""
        return self.do_sample or self.repetition_penalty != 1.0

    def sampler(self, seed: tuple[int, int]) -> "TokenSampler | None":
        """Return the sampler of a text, None if the most likely tokens are chosen."""
        return TokenSampler(self, seed) if self.reads_logits else None

    def processors(self) -> LogitsProcessorList:
        """Return transformers' filters in transformers' order."""
        out = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            out.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if not self.do_sample:
            return out
        if self.temperature != 1.0:
            out.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            out.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            out.append(TopPLogitsWarper(self.top_p))
        if self.min_p > 0.0:
            out.append(MinPLogitsWarper(self.min_p))
        return out


class TokenSampler:
    """Choice of the tokens of one text; `seed` is (seed of the call, number of the text)."""

    def __init__(self, sampling: Sampling, seed: tuple[int, int]) -> None:
        self._samples = sampling.do_sample
        self._processors = sampling.processors()
        # torch's generator reads 32 bits of its seed.
        (mixed,) = np.random.SeedSequence(seed).generate_state(1).tolist()
        self._generator = torch.Generator().manual_seed(mixed)

    def __call__(self, ids: Sequence[int], logits: Tensor) -> int:
        """Return the token that follows `ids`, for its logits (V,) fp32."""
        text: Any = torch.tensor([ids])  # transformers annotates LongTensor
        scores = self._processors(text, logits[None])
        if self._samples:
            probabilities = scores.softmax(dim=-1)[0]
            if not probabilities.isnan().any():  # those of a diverged model are
                return int(torch.multinomial(probabilities, 1, generator=self._generator))
        return int(scores.argmax())


class StopString(NamedTuple):
    """String that ends a text. The empty string ends it after one token, as in lm-eval."""

    text: str
    searched: int
    """Number of tokens at the end of a text in which it is searched after each token."""

    @classmethod
    def of(cls, text: str, tokenizer: EvalTokenizer) -> "StopString":
        """Return the stop string of a text."""
        return cls(text, len(tokenizer.encode(text, special=False)) + STOP_LOOKBACK)


@dataclass
class Generation:
    """One text while it is generated."""

    prompt: list[int]
    """Token ids of the prompt, at least one."""
    max_tokens: int
    """Maximum number of generated tokens, at least 1."""
    stops: tuple["StopString", ...]
    """In the order in which the result is cut at them."""
    sampler: TokenSampler | None = None
    """None for the most likely tokens."""
    tokens: list[int] = field(default_factory=list)
    """Generated token ids, with the end-of-text token."""

    def choice(self) -> TokenChoice | None:
        """Return the choice of the next token."""
        if self.sampler is None:
            return None
        return partial(self.sampler, self.prompt + self.tokens)

    def ends(self, eos_ids: frozenset[int], tokenizer: EvalTokenizer) -> bool:
        """Return True if the last token completes the text."""
        if self.tokens[-1] in eos_ids or len(self.tokens) >= self.max_tokens:
            return True
        return any(
            stop.text in tokenizer.decode(self.tokens[-stop.searched :], special=True)
            for stop in self.stops
        )

    def text(self, tokenizer: EvalTokenizer) -> str:
        """Return the generated text before the stop strings."""
        text = tokenizer.decode(self.tokens)
        for stop in self.stops:
            text = text.split(stop.text)[0] if stop.text else text
        return text


def generate(
    batch: Sequence[Generation],
    scorer: TokenScorer,
    tokenizer: EvalTokenizer,
    eos_ids: frozenset[int],
    after_token: Callable[[], None] = lambda: None,
) -> None:
    """Complete the texts of a batch. Collective over the tensor-parallel group.

    `after_token` is called when each active text has a new token.
    """
    active = list(batch)
    decoder = scorer.decode([text.prompt for text in active])
    while active:
        tokens = decoder.next_tokens([text.choice() for text in active])
        for text, token in zip(active, tokens, strict=True):
            text.tokens.append(token)
        after_token()
        rows = [row for row, text in enumerate(active) if not text.ends(eos_ids, tokenizer)]
        if 0 < len(rows) < len(active):
            decoder.keep(rows)
        active = [active[row] for row in rows]
