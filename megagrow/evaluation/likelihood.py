"""Log-likelihoods of continuations; each common prefix is computed once.

Requests whose tokens are equal except for the last one share a forward pass: a question with
one-token choices costs one sequence, not one sequence per choice.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megagrow.common.progress import PhaseProgress
from megagrow.errors import DataError
from megagrow.evaluation.logprobs import TokenQuery, TokenScorer

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation; neither is empty."""


@dataclass
class PrefixGroup:
    """Requests whose tokens are equal except for the last one."""

    tokens: tuple[int, ...]
    """Input of the model: all tokens except the last, truncated on the left to the context."""
    requests: list[int] = field(default_factory=list)
    """Indices of the requests."""
    lengths: list[int] = field(default_factory=list)
    """Number of tokens of each request's continuation."""
    last_tokens: list[int] = field(default_factory=list)
    """Last token of each request."""

    @property
    def num_scored(self) -> int:
        """Number of positions, at the end of the sequence, whose next token is scored."""
        return max(self.lengths)

    @property
    def labels(self) -> list[int]:
        """Tokens scored at all these positions except the last."""
        return list(self.tokens[len(self.tokens) - self.num_scored + 1 :])


def log_likelihoods(
    pairs: list[Pair], scorer: TokenScorer, max_length: int, batch_size: int
) -> list[tuple[float, bool]]:
    """Return each continuation's log-likelihood in nats, and True if it is the greedy one.

    A sequence that is too long is truncated on the left: the model reads the last `max_length`
    tokens. Raises InputError if a continuation alone is longer than that.
    """
    out: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    groups = sorted(_group_by_prefix(pairs, max_length), key=lambda group: -len(group.tokens))
    progress = PhaseProgress("evaluation", len(groups), "sequences")
    for first in range(0, len(groups), batch_size):
        batch = groups[first : first + batch_size]
        scores, greedy = scorer.scores([list(g.tokens) for g in batch], _make_query(batch))
        for request, answer in _distribute(batch, scores, greedy):
            out[request] = answer
        progress.advance(len(batch))
    return out


def _group_by_prefix(pairs: list[Pair], max_length: int) -> list[PrefixGroup]:
    groups: dict[tuple[int, ...], PrefixGroup] = {}
    for request, (context, continuation) in enumerate(pairs):
        if len(continuation) > max_length:
            raise DataError(
                f"a continuation has {len(continuation)} tokens, but the context length of the "
                f"model is {max_length}"
            )
        tokens = tuple(context + continuation)
        group = groups.setdefault(tokens[:-1], PrefixGroup(tokens[:-1][-max_length:]))
        group.requests.append(request)
        group.lengths.append(len(continuation))
        group.last_tokens.append(tokens[-1])
    return list(groups.values())


def _make_query(batch: list[PrefixGroup]) -> TokenQuery:
    rows: list[int] = []
    columns: list[int] = []
    owners: list[int] = []
    labels: list[int] = []
    for row, group in enumerate(batch):
        first, length = len(rows), len(group.tokens)
        rows += [row] * group.num_scored
        columns += range(length - group.num_scored, length)
        owners += range(first, first + group.num_scored - 1)
        owners += [first + group.num_scored - 1] * len(group.last_tokens)
        labels += group.labels + group.last_tokens
    return TokenQuery(rows, columns, owners, labels)


def _distribute(
    batch: list[PrefixGroup], scores: list[float], greedy: list[bool]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Yield (request index, answer), summing each request's token scores."""
    place = 0
    for group in batch:
        common = slice(place, place + group.num_scored - 1)
        place = common.stop
        for request, length in zip(group.requests, group.lengths, strict=True):
            own = slice(common.stop - length + 1, common.stop)
            total = sum(scores[own]) + scores[place]
            yield request, (total, all(greedy[own]) and greedy[place])
            place += 1
