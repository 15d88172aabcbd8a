"""Data of a run: training stream, validation stream, and checks before the start."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from megagrow.config.schema import CorpusConfig, RunConfig
from megagrow.data.batches import BatchReader, open_stream
from megagrow.data.sft import open_mask
from megagrow.data.stream import TokenStream
from megagrow.data.tokenizers import check_tokenizer
from megagrow.errors import DataError, InputError


@dataclass(frozen=True)
class Inputs:
    """Readers shared by all stages; the stream does not change at a growth."""

    train: BatchReader
    validation: BatchReader | None
    validation_sequences: int
    fixed: BatchReader
    """Reader whose first sequences form the fixed batch for evaluating growths."""


def open_inputs(run: RunConfig) -> Inputs:
    """Open and validate corpora and tokenizer. Raises DataError naming the file."""
    data, length = run.data, run.data.sequence_length
    vocab_size = run.stages[0].model.vocab_size
    if data.tokenizer is not None:
        check_tokenizer(data.tokenizer, vocab_size)
    stream = open_stream(data.train, run.seed, length)
    train = _reader(run, stream, data.train, shuffle=True)
    if not data.validation:
        return Inputs(train, None, 0, train)
    stream = open_stream(data.validation, run.seed, length, shuffle=False)
    sequences = min(-(-run.validation.tokens // length), stream.epoch_tokens // length)
    if sequences == 0:
        raise DataError(
            f"data.validation holds {stream.epoch_tokens} tokens, less than a sequence of {length}"
        )
    validation = _reader(run, stream, data.validation, shuffle=False)
    return Inputs(train, validation, sequences, validation)


def input_problems(run: RunConfig) -> list[str]:
    """Return all errors that `open_inputs` would raise, one per corpus."""
    data, found = run.data, []
    checks: list[Callable[[], object]] = []
    if data.tokenizer is not None:
        checks.append(partial(check_tokenizer, data.tokenizer, run.stages[0].model.vocab_size))
    for shuffle, corpora in ((True, data.train), (False, data.validation)):
        checks += [partial(_open_alone, run, corpus, shuffle) for corpus in corpora]
    for check in checks:
        found += _problem(check)
    return found or _problem(partial(open_inputs, run))


def _open_alone(run: RunConfig, corpus: CorpusConfig, shuffle: bool) -> BatchReader:
    stream = open_stream([corpus], run.seed, run.data.sequence_length, shuffle)
    return _reader(run, stream, [corpus], shuffle)


def _problem(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except (InputError, OSError) as error:
        return [str(error)]
    return []


def _reader(
    run: RunConfig, stream: TokenStream, corpora: Sequence[CorpusConfig], shuffle: bool
) -> BatchReader:
    """Return a reader of an opened stream, with its mask stream if the run has masks."""
    length, vocab_size = run.data.sequence_length, run.stages[0].model.vocab_size
    mask = open_mask(stream, corpora, run.seed, length, shuffle) if run.objective == "sft" else None
    return BatchReader(stream, run.data, vocab_size, mask)
