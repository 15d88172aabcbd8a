"""Greedy decoding in batches, without a KV cache: each new token is a forward pass over all tokens
of its sequence."""

from collections.abc import Callable
from dataclasses import dataclass, field

from megagrow.evaluation.logprobs import TokenScorer


@dataclass
class Generation:
    """One text during generation."""

    context: list[int]
    """Token ids of the prompt."""
    stop_strings: tuple[str, ...]
    """The text ends before the first occurrence of any of these."""
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    """Generated token ids, without the end-of-document token."""
    result: str | None = None
    """The generated text; None until it is complete."""

    def add(self, token: int, eos: int, decode: Callable[[list[int]], str]) -> None:
        """Append the next token and set `result` if the text is complete."""
        if token != eos:
            self.tokens.append(token)
        text = decode(self.tokens)
        ends = [text.index(stop) for stop in self.stop_strings if stop in text]
        if ends or token == eos or len(self.tokens) == self.max_tokens:
            self.result = text[: min(ends)] if ends else text


def generate(
    batch: list[Generation], scorer: TokenScorer, eos: int, decode: Callable[[list[int]], str]
) -> None:
    """Generate a batch of texts to completion. Collective over the tensor-parallel group."""
    while active := [text for text in batch if text.result is None]:
        tokens = scorer.greedy_tokens([text.context + text.tokens for text in active])
        for text, token in zip(active, tokens, strict=True):
            text.add(token, eos, decode)
