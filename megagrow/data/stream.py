"""The stream: all tokens that a run reads, one after the other, without an end.

Every corpus is cut, in file order, into blocks of `block_size` tokens. One epoch of a corpus is
all of its full blocks in an order that depends on (seed, corpus, epoch), then its shorter last
block; the epochs follow each other for ever. The stream is made of slots of `block_size` tokens:
slot k takes the next `block_size` tokens of the corpus that the blend names for k.

So what stands at a position is computed from the position alone, in O(1) time and memory. It does
not depend on how the run is laid out over ranks, nor on the sequences that the stream is cut into.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagrow.data.blend import Blend, Permutation
from megagrow.data.indexed import IndexedCorpus

NO_LABEL = -100
"""The label of a corpus's last token, which nothing follows: ignored by the loss."""


@dataclass(frozen=True)
class Tokens:
    """Consecutive tokens of the stream."""

    inputs: np.ndarray
    """Token ids, int64 [count]."""
    labels: np.ndarray
    """The tokens that follow them in the corpus, also over the end of a block, int64 [count]."""
    boundaries: np.ndarray
    """True where a token does not continue the one before it, because a document starts or
    because the stream went elsewhere; bool [count]."""


@dataclass(frozen=True)
class StreamLocation:
    """Where in the files a position of the stream is found."""

    corpus: int
    offset: int
    """In tokens from the start of the corpus."""
    run: int
    """How many tokens from here on, at least 1, are consecutive in the stream and in the file."""


class TokenStream:
    """The endless stream of `corpora`, blended by `weights`; with `shuffle=False` in file order.

    It has no state: a position is a number of tokens, and any position can be read at any time.
    """

    def __init__(
        self,
        corpora: Sequence[IndexedCorpus],
        weights: Sequence[float],
        seed: int,
        block_size: int,
        shuffle: bool = True,
    ) -> None:
        self.corpora = list(corpora)
        self._blend = Blend(weights)
        self._seed = seed
        self._block_size = block_size
        self._shuffle = shuffle

    @property
    def epoch_tokens(self) -> int:
        """The position at which, for the first time, a token is read again."""
        ends = []
        for index, corpus in enumerate(self.corpora):
            turns, rest = divmod(corpus.num_tokens, self._block_size)
            ends.append(self._blend.slot_of(index, turns) * self._block_size + rest)
        return min(ends)

    def locate(self, position: int) -> StreamLocation:
        """The place in the files of the token at a position of the stream."""
        slot, within_slot = divmod(position, self._block_size)
        corpus = self._blend.corpus_of(slot)
        turn = self._blend.count(corpus, slot)
        total = self.corpora[corpus].num_tokens
        epoch, within_epoch = divmod(turn * self._block_size + within_slot, total)
        block, within_block = divmod(within_epoch, self._block_size)
        offset = self._file_block(corpus, epoch, block) * self._block_size + within_block
        run = min(self._block_size - max(within_slot, within_block), total - within_epoch)
        return StreamLocation(corpus, offset, run)

    def read(self, position: int, count: int) -> Tokens:
        """The tokens at [position, position + count) of the stream."""
        tokens = Tokens(
            np.empty(count, np.int64), np.empty(count, np.int64), np.zeros(count, np.bool_)
        )
        done = 0
        while done < count:
            place = self.locate(position + done)
            length = min(place.run, count - done)
            self._fill(tokens, done, length, place)
            tokens.boundaries[done] |= not self._continues(position + done, place)
            done += length
        return tokens

    def _file_block(self, corpus: int, epoch: int, block: int) -> int:
        """Which block of the file is the given one of an epoch; the short block stays last."""
        full_blocks = self.corpora[corpus].num_tokens // self._block_size
        if not self._shuffle or block == full_blocks:
            return block
        return Permutation(full_blocks, self._seed, corpus, epoch)(block)

    def _continues(self, position: int, place: StreamLocation) -> bool:
        """Whether the token at `position` follows, in the file too, the one before it."""
        if position == 0:
            return False
        before = self.locate(position - 1)
        return (before.corpus, before.offset + 1) == (place.corpus, place.offset)

    def _fill(self, tokens: Tokens, start: int, length: int, place: StreamLocation) -> None:
        """Copy `length` tokens of one corpus into [start, start + length) of the arrays."""
        corpus = self.corpora[place.corpus]
        stop = place.offset + length
        read = corpus.tokens[place.offset : stop + 1]
        tokens.inputs[start : start + length] = read[:length]
        tokens.labels[start : start + len(read) - 1] = read[1:]
        if stop == corpus.num_tokens:
            tokens.labels[start + length - 1] = NO_LABEL
        starts = corpus.document_starts(place.offset, stop)
        tokens.boundaries[start + starts - place.offset] = True
