"""Token stream: the endless sequence of all tokens that a run reads.

Every corpus is split, in file order, into blocks of `block_size` tokens. One epoch of a corpus is
all of its full blocks in an order that depends on (seed, corpus, epoch), followed by its shorter
last block; epochs repeat without end. The stream consists of slots of `block_size` tokens: slot k
takes the next `block_size` tokens of the corpus that the blend assigns to k.

The token at a position is computed from the position alone, in O(1) time and memory. It does not
depend on the layout of the run over ranks or on the sequences cut from the stream.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagrow.data.blend import Blend, Permutation
from megagrow.data.indexed import IndexedCorpus

NO_LABEL = -100
"""Label of a corpus's last token, which has no next token; ignored by the loss."""


@dataclass(frozen=True)
class Tokens:
    """Consecutive tokens of the stream."""

    inputs: np.ndarray
    """Token ids, int64 [count]."""
    labels: np.ndarray
    """Next tokens in the corpus, also across the end of a block, int64 [count]."""
    boundaries: np.ndarray
    """True where a token does not continue the previous one, because a document starts or the
    stream jumps to another block; bool [count]."""


@dataclass(frozen=True)
class StreamLocation:
    """Location of a stream position in the files."""

    corpus: int
    offset: int
    """Offset from the start of the corpus in tokens."""
    run: int
    """Number of tokens from here, at least 1, that are consecutive in both stream and file."""


class TokenStream:
    """Endless stream of `corpora`, blended by `weights`; with `shuffle=False` in file order.

    Stateless: a position is a token count, and any position can be read at any time. `keys` are
    the integers of the corpora that determine their order, by default their indices.
    """

    def __init__(
        self,
        corpora: Sequence[IndexedCorpus],
        weights: Sequence[float],
        seed: int,
        block_size: int,
        shuffle: bool = True,
        keys: Sequence[int] | None = None,
    ) -> None:
        self.corpora = list(corpora)
        self._keys = list(range(len(corpora))) if keys is None else list(keys)
        self._offsets = [0] * len(corpora)
        self._blend = Blend(weights)
        self._seed = seed
        self._block_size = block_size
        self._shuffle = shuffle

    def starting_at(self, offsets: Sequence[int]) -> "TokenStream":
        """Return the stream with each corpus starting after `offsets` of its tokens, counted over
        its epochs."""
        changed = copy.copy(self)
        changed._offsets = list(offsets)
        return changed

    @property
    def epoch_tokens(self) -> int:
        """Position at which a token is repeated for the first time."""
        ends = []
        for index, corpus in enumerate(self.corpora):
            turns, rest = divmod(corpus.num_tokens, self._block_size)
            ends.append(self._blend.slot_of(index, turns) * self._block_size + rest)
        return min(ends)

    def tokens_read(self, corpus: int, position: int) -> int:
        """Return the number of tokens before `position` that belong to a corpus."""
        slot, within_slot = divmod(position, self._block_size)
        current = within_slot if self._blend.corpus_of(slot) == corpus else 0
        return self._blend.count(corpus, slot) * self._block_size + current

    def locate(self, position: int) -> StreamLocation:
        """Return the location in the files of the token at a position of the stream."""
        slot, within_slot = divmod(position, self._block_size)
        corpus = self._blend.corpus_of(slot)
        done = self._offsets[corpus] + self._blend.count(corpus, slot) * self._block_size
        total = self.corpora[corpus].num_tokens
        epoch, within_epoch = divmod(done + within_slot, total)
        block, within_block = divmod(within_epoch, self._block_size)
        offset = self._file_block(corpus, epoch, block) * self._block_size + within_block
        run = min(self._block_size - max(within_slot, within_block), total - within_epoch)
        return StreamLocation(corpus, offset, run)

    def read(self, position: int, count: int) -> Tokens:
        """Read the tokens at [position, position + count) of the stream."""
        tokens = Tokens(
            np.empty(count, np.int64), np.empty(count, np.int64), np.zeros(count, np.bool_)
        )
        done = 0
        while done < count:
            location = self.locate(position + done)
            length = min(location.run, count - done)
            self._fill(tokens, done, length, location)
            tokens.boundaries[done] |= not self._continues(position + done, location)
            done += length
        return tokens

    def _file_block(self, corpus: int, epoch: int, block: int) -> int:
        """Return the file block of a block of an epoch; the short block stays last."""
        full_blocks = self.corpora[corpus].num_tokens // self._block_size
        if not self._shuffle or block == full_blocks:
            return block
        return Permutation(full_blocks, self._seed, self._keys[corpus], epoch)(block)

    def _continues(self, position: int, location: StreamLocation) -> bool:
        """Return True if the token at `position` follows the previous one in the file too."""
        if position == 0:
            return False
        before = self.locate(position - 1)
        return (before.corpus, before.offset + 1) == (location.corpus, location.offset)

    def _fill(self, tokens: Tokens, start: int, length: int, location: StreamLocation) -> None:
        """Copy `length` tokens of one corpus into [start, start + length) of the arrays."""
        corpus = self.corpora[location.corpus]
        stop = location.offset + length
        read = corpus.tokens[location.offset : stop + 1]
        tokens.inputs[start : start + length] = read[:length]
        tokens.labels[start : start + len(read) - 1] = read[1:]
        if stop == corpus.num_tokens:
            tokens.labels[start + length - 1] = NO_LABEL
        starts = corpus.document_starts(location.offset, stop)
        tokens.boundaries[start + starts - location.offset] = True
