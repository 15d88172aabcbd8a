"""Training streams of the stages of a run.

Consecutive stages with the same corpora, weights and sequence length share one stream: a later
stage continues where the earlier one ended. Every other stage has a stream of its own, whose slots
are blended from the first one on. With `corpus_position: continue` each corpus that an earlier
stage has read continues at the number of tokens read of it, with `restart` at its first token.

The order of a corpus is the same in all streams of one sequence length. Streams with another
sequence length cut it into other blocks and shuffle these, so a stage that continues may repeat
tokens of earlier stages and leave out as many others.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from megagrow.common.sizes import format_short
from megagrow.config.schema import CorpusConfig, RunConfig, StageConfig
from megagrow.config.stage_length import tokens_between
from megagrow.data.batches import Batch, BatchReader, open_stream
from megagrow.data.corpus_identity import CorpusIdentity, corpus_identities
from megagrow.data.indexed import IndexedCorpus
from megagrow.data.sft import open_mask

MANY_EPOCHS = 4
"""Up to here repeated tokens are almost as good as new ones (Muennighoff et al. 2023)."""

Starts = tuple[tuple[int, int], ...]
"""For each stage after the first: trained tokens and position at its start."""


class StreamPlace(NamedTuple):
    """Position of a batch in the training data of a run."""

    position: int
    """Tokens of the run before the batch, those that rewinds have skipped included."""
    stage: int = 0
    starts: Starts = ()
    """Starts of the stages up to this one. A missing start is 0."""

    def after(self, tokens: int) -> "StreamPlace":
        """Return the place `tokens` tokens later in the same stage."""
        return self._replace(position=self.position + tokens)


class StageStreams:
    """Readers of the training streams of all stages.

    `keys` has an integer for each corpus of each stage, equal for the same corpus.
    """

    def __init__(
        self,
        stages: Sequence[StageConfig],
        readers: Sequence[BatchReader],
        keys: Sequence[tuple[int, ...]],
    ) -> None:
        self.readers = tuple(readers)
        """Reader of each stage, of a stream whose corpora start at their first token."""
        self._stages = tuple(stages)
        self._keys = tuple(keys)
        self._first = [0]
        for before, index in pairwise(range(len(stages))):
            self._first.append(self._first[-1] if self._continues(before, index) else index)
        self._reader = lru_cache(maxsize=4)(self._opened)

    def read(self, place: StreamPlace, sequence_indices: Sequence[int]) -> Batch:
        """Read the given sequences of the global batch at a place."""
        first = self._first[place.stage]
        reader = self._reader(place.stage, _padded(place.starts, first))
        begin = _padded(place.starts, first)[-1][0] if first else 0
        return reader.read(place.position - begin, sequence_indices)

    def tokens_read(self, starts: Starts, position: int) -> Mapping[int, int]:
        """Return the tokens that are read of each corpus, by key, up to a position.

        `starts` has the starts of all stages after the first.
        """
        total: dict[int, int] = {}
        for first, begin, end in self._spans(len(self._stages) - 1, starts, position):
            for index, key in enumerate(self._keys[first]):
                count = self.readers[first].stream.tokens_read(index, end - begin)
                total[key] = total.get(key, 0) + count
        return total

    def corpora(self) -> Mapping[int, IndexedCorpus]:
        """Return the distinct corpora by key, in the order of their first stage."""
        found: dict[int, IndexedCorpus] = {}
        for reader, keys in zip(self.readers, self._keys, strict=True):
            for key, corpus in zip(keys, reader.stream.corpora, strict=True):
                found.setdefault(key, corpus)
        return found

    def _continues(self, before: int, index: int) -> bool:
        """Return True if two consecutive stages share one stream."""
        one, other = (self._stages[each].data for each in (before, index))
        weights = [[corpus.weight for corpus in data.train] for data in (one, other)]
        return (
            other.corpus_position == "continue"
            and one.sequence_length == other.sequence_length
            and self._keys[before] == self._keys[index]
            and weights[0] == weights[1]
        )

    def _spans(self, stage: int, starts: Starts, position: int) -> Iterable[tuple[int, int, int]]:
        """Yield the streams up to that of a stage: first stage, trained tokens at its start, and
        the position at which the following stream starts, or `position`."""
        known = ((0, 0), *_padded(starts, stage))
        firsts = sorted({self._first[index] for index in range(stage + 1)})
        for first, following in pairwise((*firsts, None)):
            assert first is not None
            yield first, known[first][0], position if following is None else known[following][1]

    def _opened(self, stage: int, starts: Starts) -> BatchReader:
        """Return the reader of a stage whose stream starts at the last of `starts`."""
        reached: dict[int, int] = {}
        offsets: tuple[int, ...] = ()
        for first, begin, end in self._spans(self._first[stage], starts, position=0):
            keys, stream = self._keys[first], self.readers[first].stream
            restarts = self._stages[first].data.corpus_position == "restart"
            offsets = tuple(0 if restarts else reached.get(key, 0) for key in keys)
            for index, key in enumerate(keys):
                reached[key] = offsets[index] + stream.tokens_read(index, max(0, end - begin))
        reader = self.readers[stage]
        return reader.on(reader.stream.starting_at(offsets)) if any(offsets) else reader


def _padded(starts: Starts, stages: int) -> Starts:
    """Return the starts of the first stages after stage 0."""
    return (*starts, *((0, 0),) * (stages - len(starts)))[:stages]


def open_stage_streams(run: RunConfig, identities: Mapping[str, CorpusIdentity]) -> StageStreams:
    """Open the training streams of all stages. Raises DataError for a damaged corpus.

    `identities` are those of all corpora by path.
    """
    known: dict[tuple[str, int], int] = {}
    readers: dict[str, BatchReader] = {}
    keys = [_keys_of(stage, identities, known) for stage in run.stages]
    for stage, own in zip(run.stages, keys, strict=True):
        name = _data_key(stage)
        if name not in readers:
            readers[name] = open_reader(run, stage, stage.data.train, keys=own)
    return StageStreams(run.stages, [readers[_data_key(stage)] for stage in run.stages], keys)


def _data_key(stage: StageConfig) -> str:
    return stage.data.model_dump_json(exclude={"corpus_position"})


def _keys_of(
    stage: StageConfig,
    identities: Mapping[str, CorpusIdentity],
    known: dict[tuple[str, int], int],
) -> tuple[int, ...]:
    """Return the keys of a stage's corpora; adds new ones to `known`.

    A corpus is known by its contents and by its number among equal ones of its stage.
    """
    contents = [identities[str(corpus.path)].content for corpus in stage.data.train]
    names = [(content, contents[:index].count(content)) for index, content in enumerate(contents)]
    return tuple(known.setdefault(name, len(known)) for name in names)


def open_reader(
    run: RunConfig,
    stage: StageConfig,
    corpora: Sequence[CorpusConfig],
    shuffle: bool = True,
    keys: Sequence[int] | None = None,
) -> BatchReader:
    """Open corpora in sequences of a stage, with their masks if the run has masks."""
    length = stage.data.sequence_length
    stream = open_stream(corpora, run.seed, length, shuffle, keys)
    mask = open_mask(stream, corpora, run.seed, length, shuffle) if run.objective == "sft" else None
    return BatchReader(stream, stage.data, run.stages[0].model.vocab_size, mask)


@dataclass(frozen=True)
class CorpusEpochs:
    """Tokens that a run reads of one corpus."""

    prefix: Path
    tokens: int
    """Tokens of the corpus."""
    read: int
    """Tokens read of it, with repetitions."""

    @property
    def epochs(self) -> float:
        return self.read / self.tokens

    def line(self) -> str:
        """Return a log line: path, size, epochs."""
        return (
            f"corpus {self.prefix} | {format_short(self.tokens)} tokens | {self.epochs:.2f} epochs"
        )

    def warning(self) -> str | None:
        """Return a warning if the corpus is repeated more often than is known to help."""
        if self.epochs <= MANY_EPOCHS:
            return None
        return (
            f"{self.prefix}: read for {self.epochs:.1f} epochs; repeated tokens lose their value "
            f"beyond about {MANY_EPOCHS} (Muennighoff et al. 2023, arXiv:2305.16264)"
        )


def stream_epochs(run: RunConfig, streams: StageStreams) -> tuple[CorpusEpochs, ...]:
    """Return the epochs of each training corpus over all stages, without tokens read by growths."""
    ends = [tokens_between(run, 0, index + 1) for index in range(len(run.stages))]
    read = streams.tokens_read(tuple((end, end) for end in ends[:-1]), ends[-1])
    return tuple(
        CorpusEpochs(corpus.prefix, corpus.num_tokens, read[key])
        for key, corpus in streams.corpora().items()
    )


def epoch_warnings(run: RunConfig, epochs: Iterable[CorpusEpochs]) -> list[str]:
    """Return warnings about many epochs; instruction data is usually read several times."""
    if run.objective == "sft":
        return []
    return [warning for each in epochs if (warning := each.warning()) is not None]


def epoch_lines(run: RunConfig) -> list[str]:
    """Return the epochs of each training corpus and warnings. Raises DataError for a bad corpus."""
    epochs = stream_epochs(run, open_stage_streams(run, corpus_identities(run)))
    warnings = (f"Warning: {text}" for text in epoch_warnings(run, epochs))
    return [*(each.line() for each in epochs), *warnings]
