"""Log-likelihoods of continuations, each common prefix computed once.

Continuations whose tokens are the same up to the last one share a forward pass: a question with
choices of one token costs one sequence, not one for each choice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from megagrow.errors import DataError
from megagrow.evaluation.logprobs import Asked, Scores

Pair = tuple[list[int], list[int]]
"""Tokens of a context and of its continuation, neither empty."""


@dataclass
class Shared:
    """The requests whose tokens agree but for the last one."""

    tokens: tuple[int, ...]
    """What the model reads: all but the last token, at most as many as it can."""
    requests: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens of the continuations."""
    lasts: list[int] = field(default_factory=list)
    """Last tokens."""

    @property
    def asked(self) -> int:
        """Positions whose tokens are asked for, at the end of the sequence."""
        return max(self.lengths)

    @property
    def labels(self) -> list[int]:
        """The tokens asked for before the last position."""
        return list(self.tokens[len(self.tokens) - self.asked + 1 :])


def log_likelihoods(
    pairs: list[Pair], scorer: Scores, max_length: int, batch_size: int, device: torch.device
) -> list[tuple[float, bool]]:
    """Of each continuation: its log-likelihood in nats, and whether greedy decoding gives it.

    What is too long loses its beginning: the model reads the last `max_length` tokens. InputError
    if that would be tokens of the continuation.
    """
    out: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    groups = sorted(_grouped(pairs, max_length), key=lambda shared: -len(shared.tokens))
    for first in range(0, len(groups), batch_size):
        batch = groups[first : first + batch_size]
        scores, greedy = scorer.scores([list(s.tokens) for s in batch], _asked(batch, device))
        for request, found in _shared_out(batch, scores, greedy):
            out[request] = found
    return out


def _grouped(pairs: list[Pair], max_length: int) -> list[Shared]:
    groups: dict[tuple[int, ...], Shared] = {}
    for request, (context, continuation) in enumerate(pairs):
        if len(continuation) > max_length:
            raise DataError(
                f"a continuation of {len(continuation)} tokens: the model reads {max_length}"
            )
        whole = tuple(context + continuation)
        shared = groups.setdefault(whole[:-1], Shared(whole[:-1][-max_length:]))
        shared.requests.append(request)
        shared.lengths.append(len(continuation))
        shared.lasts.append(whole[-1])
    return list(groups.values())


def _asked(batch: list[Shared], device: torch.device) -> Asked:
    rows: list[int] = []
    columns: list[int] = []
    owners: list[int] = []
    labels: list[int] = []
    for row, shared in enumerate(batch):
        first, length = len(rows), len(shared.tokens)
        rows += [row] * shared.asked
        columns += range(length - shared.asked, length)
        owners += range(first, first + shared.asked - 1)
        owners += [first + shared.asked - 1] * len(shared.lasts)
        labels += shared.labels + shared.lasts
    return Asked(
        *(torch.tensor(values, device=device) for values in (rows, columns, owners, labels))
    )


def _shared_out(
    batch: list[Shared], scores: list[float], greedy: list[bool]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    place = 0
    for shared in batch:
        common = slice(place, place + shared.asked - 1)
        place = common.stop
        for request, length in zip(shared.requests, shared.lengths, strict=True):
            own = slice(common.stop - length + 1, common.stop)
            total = sum(scores[own]) + scores[place]
            yield request, (total, all(greedy[own]) and greedy[place])
            place += 1
