"""Data of a run: training stream, validation stream, and checks before the start."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch.distributed as dist

from megagrow.config.schema import CorpusConfig, RunConfig
from megagrow.config.sections import UNNAMED_SET
from megagrow.data.batches import (
    BatchReader,
    CorpusEpochs,
    epoch_warnings,
    open_stream,
    stream_epochs,
)
from megagrow.data.corpus_identity import (
    Contents,
    CorpusIdentity,
    UsedTokenizer,
    corpus_identity,
    data_contents,
    one_tokenizer,
    unknown_tokenizer_warning,
)
from megagrow.data.sft import open_mask
from megagrow.data.stream import TokenStream
from megagrow.data.tokenizers import check_tokenizer
from megagrow.errors import DataError, InputError
from megagrow.parallel.agreement import run_on_all_ranks


@dataclass(frozen=True)
class ValidationSet:
    """Reader of a validation set, and the number of sequences that a validation reads."""

    reader: BatchReader
    sequences: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Readers shared by all stages; the stream does not change at a growth."""

    train: BatchReader
    validation: dict[str, ValidationSet]
    """Validation sets by name, in the order of the run file."""
    fixed: BatchReader
    """Reader whose first sequences form the fixed batch for evaluating growths."""
    identities: dict[str, CorpusIdentity]
    """Identities of all corpora by path."""
    contents: Contents
    epochs: tuple[CorpusEpochs, ...]
    """Epochs of each training corpus over the run."""
    warnings: tuple[str, ...]


def open_inputs(run: RunConfig) -> Inputs:
    """Open and validate corpora and tokenizer. Raises DataError naming the file."""
    identities = corpus_identities(run)
    tokenizers = used_tokenizers(run, identities)
    tokenizer = one_tokenizer(tokenizers)
    data = run.stages[0].data
    stream = open_stream(data.train, run.seed, data.sequence_length)
    train = _reader(run, stream, data.train, shuffle=True)
    validation = {name: _open_validation(run, name) for name in run.data.validation}
    if corpus_identities(run) != identities:
        raise DataError("a corpus was replaced while it was opened; start the run again")
    epochs = stream_epochs(run, stream)
    unknown = unknown_tokenizer_warning(tokenizers)
    return Inputs(
        train=train,
        validation=validation,
        fixed=next((each.reader for each in validation.values()), train),
        identities=identities,
        contents=data_contents(run, identities, tokenizer),
        epochs=epochs,
        warnings=(*filter(None, (unknown,)), *epoch_warnings(run, epochs)),
    )


def _open_validation(run: RunConfig, name: str) -> ValidationSet:
    corpora, length = run.data.validation[name], run.stages[0].data.sequence_length
    stream = open_stream(corpora, run.seed, length, shuffle=False)
    sequences = min(-(-run.validation.tokens // length), stream.epoch_tokens // length)
    if sequences == 0:
        key = "data.validation" + ("" if name == UNNAMED_SET else f".{name}")
        raise DataError(
            f"{key} holds {stream.epoch_tokens} tokens, less than a sequence of {length}"
        )
    return ValidationSet(_reader(run, stream, corpora, shuffle=False), sequences)


def open_inputs_on_all_ranks(run: RunConfig) -> Inputs:
    """Open the inputs on every rank. Collective.

    Raises DataError on all ranks if one of them cannot open its files, or if the corpora of two
    ranks differ.
    """
    inputs = run_on_all_ranks(lambda: open_inputs(run))
    gathered: list[dict[str, CorpusIdentity]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, inputs.identities)
    for rank, identities in enumerate(gathered):
        for path, identity in identities.items():
            if identity != gathered[0][path]:
                raise DataError(
                    f"{path}: the corpus of rank {rank} differs from that of rank 0; copy the same "
                    "files to all hosts"
                )
    return inputs


def corpus_identities(run: RunConfig) -> dict[str, CorpusIdentity]:
    """Return the identities of all corpora by path. Raises DataError for a damaged corpus."""
    return {
        str(corpus.path): corpus_identity(corpus.path)
        for corpus in chain(run.stages[0].data.train, *run.data.validation.values())
    }


def used_tokenizers(
    run: RunConfig, identities: Mapping[str, CorpusIdentity]
) -> dict[str, UsedTokenizer | None]:
    """Return the tokenizers of all corpora and `data.tokenizer` by owner.

    Raises DataError if `data.tokenizer` is invalid or has more tokens than the model.
    """
    used, own = {path: each.tokenizer for path, each in identities.items()}, run.data.tokenizer
    if own is not None:
        checksum = check_tokenizer(own, run.stages[0].model.vocab_size).checksum
        used[f"data.tokenizer = {own}"] = UsedTokenizer(checksum, own)
    return used


def open_or_list_problems(run: RunConfig) -> tuple[Inputs | None, list[str]]:
    """Return the inputs, or None and all their problems.

    Problems are the errors of each corpus and of `data.tokenizer`, or the one of `open_inputs`.
    """
    data = run.data
    train = run.stages[0].data.train
    checks: list[Callable[[], object]] = []
    for shuffle, corpora in ((True, train), (False, chain(*data.validation.values()))):
        checks += [partial(_open_alone, run, corpus, shuffle) for corpus in corpora]
    if data.tokenizer is not None:
        checks.append(partial(check_tokenizer, data.tokenizer, run.stages[0].model.vocab_size))
    found = [problem for check in checks for problem in _problem(check)]
    if found:
        return None, found
    try:
        return open_inputs(run), []
    except (InputError, OSError) as error:
        return None, [str(error)]


def _open_alone(run: RunConfig, corpus: CorpusConfig, shuffle: bool) -> BatchReader:
    corpus_identity(corpus.path)
    stream = open_stream([corpus], run.seed, run.stages[0].data.sequence_length, shuffle)
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
    data, vocab_size = run.stages[0].data, run.stages[0].model.vocab_size
    length = data.sequence_length
    mask = open_mask(stream, corpora, run.seed, length, shuffle) if run.objective == "sft" else None
    return BatchReader(stream, data, vocab_size, mask)
