"""Greedy decoding in batches. Nothing is kept between tokens: each is a pass over all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from megagrow.evaluation.logprobs import Scores


@dataclass
class Text:
    """A text that is being written."""

    context: list[int]
    until: tuple[str, ...]
    """Strings before which it ends."""
    most: int
    """Tokens that may be written."""
    written: list[int] = field(default_factory=list)
    result: str | None = None
    """What was written, once it is done."""

    def add(self, token: int, eos: int, decode: Callable[[list[int]], str]) -> None:
        """Takes the next token, and sees whether the text is done."""
        if token != eos:
            self.written.append(token)
        text = decode(self.written)
        ends = [text.index(stop) for stop in self.until if stop in text]
        if ends or token == eos or len(self.written) == self.most:
            self.result = text[: min(ends)] if ends else text


def write(texts: list[Text], scorer: Scores, eos: int, decode: Callable[[list[int]], str]) -> None:
    """Writes a batch of texts to their ends; all ranks of a tensor-parallel group together."""
    while open_texts := [text for text in texts if text.result is None]:
        tokens = scorer.best([text.context + text.written for text in open_texts])
        for text, token in zip(open_texts, tokens, strict=True):
            text.add(token, eos, decode)
