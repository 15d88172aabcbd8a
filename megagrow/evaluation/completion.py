"""Completion of prompts by a model: `megagrow generate` and the samples of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from megagrow.errors import DataError, printable
from megagrow.evaluation.generation import (
    Generation,
    GenerationDefaults,
    Sampling,
    StopString,
    generate,
)
from megagrow.evaluation.logprobs import TokenScorer
from megagrow.evaluation.tokenizer import EvalTokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Decoded text of an incomplete character, of which only the first bytes are generated."""


@dataclass(frozen=True)
class CompletionOptions:
    """Length and choice of the tokens of a completion."""

    max_tokens: int
    """Maximum number of generated tokens; fewer if the context length is reached."""
    sampling: Sampling
    stop_strings: tuple[str, ...] = ()
    """Strings that end a completion; they are not part of it."""
    seed: int = 1234


class Completer:
    """A model that completes prompts. Collective over the tensor-parallel group.

    The n-th prompt of a completer has its own random numbers: its completion depends on `seed` and
    n, not on the other prompts or the layout, up to rounding.

    Args:
        context_length: maximum number of tokens of a prompt and its completion.
    """

    def __init__(
        self,
        scorer: TokenScorer,
        tokenizer: EvalTokenizer,
        defaults: GenerationDefaults,
        context_length: int,
        options: CompletionOptions,
    ) -> None:
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._eos_ids = defaults.eos_ids | {tokenizer.eos_id}
        self._context_length = context_length
        self._options = options
        self._numbers = count()

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """Return the completion of each prompt; all are generated in one batch.

        Raises DataError if a prompt fills the context.
        """
        texts = [self._begin(prompt) for prompt in prompts]
        generate(texts, self._scorer, self._tokenizer, self._eos_ids)
        return [visible(text.text(self._tokenizer)) for text in texts]

    def stream(self, prompt: str, write: Callable[[str], None]) -> None:
        """Complete one prompt and call `write` with each new part of the completion.

        Tokenizers with byte fallback may decode bytes that are no character differently when more
        bytes follow; the parts are then not exactly the text that `complete` returns.

        Raises DataError if the prompt fills the context.
        """
        text, written = self._begin(prompt), 0
        longest_stop = max((len(stop.text) for stop in text.stops), default=1)

        def continue_writing(held_back: int) -> None:
            nonlocal written
            shown = visible(text.text(self._tokenizer).rstrip(UNFINISHED))
            until = max(written, len(shown) - held_back)
            write(shown[written:until])
            written = until

        # The last characters may be the beginning of a stop string.
        generate(
            [text],
            self._scorer,
            self._tokenizer,
            self._eos_ids,
            after_token=lambda: continue_writing(longest_stop - 1),
        )
        continue_writing(0)

    def _begin(self, prompt: str) -> Generation:
        ids = self._tokenizer.encode(prompt) or [self._tokenizer.prefix_id]
        space = self._context_length - len(ids)
        if space < 1:
            raise DataError(
                f"the prompt {prompt[:40]!r} has {len(ids)} tokens; the context length of the "
                f"model is {self._context_length}; shorten the prompt"
            )
        options = self._options
        sampler = options.sampling.sampler((options.seed, next(self._numbers)))
        stops = tuple(StopString.of(stop, self._tokenizer) for stop in options.stop_strings)
        return Generation(ids, min(options.max_tokens, space), stops, sampler)


def visible(text: str) -> str:
    """Return generated text with terminal control characters escaped."""
    return "".join(char if char in "\n\t" else printable(char) for char in text)


def read_prompts(file: Path) -> list[str]:
    """Return the lines of a text file, without empty ones. Raises DataError if there are none."""
    try:
        prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    if not prompts:
        raise DataError(f"{file}: no prompts; write one per line")
    return prompts
