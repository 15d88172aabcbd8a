"""Data of a run: training stream, validation stream, and checks before the start."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch.distributed as dist

from megagrow.config.schema import CorpusConfig, RunConfig, StageConfig
from megagrow.config.sections import UNNAMED_SET
from megagrow.data.batches import BatchReader
from megagrow.data.corpus_identity import (
    Contents,
    CorpusIdentity,
    UsedTokenizer,
    corpus_identities,
    corpus_identity,
    data_contents,
    one_tokenizer,
    unknown_tokenizer_warning,
)
from megagrow.data.stage_streams import (
    CorpusEpochs,
    StageStreams,
    epoch_warnings,
    open_reader,
    open_stage_streams,
    stream_epochs,
)
from megagrow.data.tokenizers import check_tokenizer
from megagrow.errors import DataError, InputError
from megagrow.parallel.agreement import run_on_all_ranks


@dataclass(frozen=True)
class ValidationSet:
    """Reader of a validation set, and the number of sequences that a validation reads."""

    reader: BatchReader
    sequences: int


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """Readers of a stage for evaluation."""

    validation: dict[str, ValidationSet]
    """Validation sets by name, in the order of the run file."""
    fixed: BatchReader
    """Reader whose first sequences form the fixed batch for evaluating growths."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Readers of the training and validation data of all stages."""

    train: StageStreams
    stages: tuple[StageInputs, ...]
    identities: dict[str, CorpusIdentity]
    """Identities of all corpora by path."""
    contents: Contents
    epochs: tuple[CorpusEpochs, ...]
    """Epochs of each training corpus over the run."""
    warnings: tuple[str, ...]

    def fixed_for(self, index: int) -> BatchReader:
        """Return the reader of the fixed batch for the transition to stage `index`.

        Its sequences have the shorter length of both stages, which both models accept.
        """
        readers = [self.stages[each].fixed for each in (index - 1, index)]
        return min(readers, key=lambda reader: reader.length)


def open_inputs(run: RunConfig) -> Inputs:
    """Open and validate corpora and tokenizer. Raises DataError naming the file."""
    identities = corpus_identities(run)
    tokenizers = used_tokenizers(run, identities)
    tokenizer = one_tokenizer(tokenizers)
    train = open_stage_streams(run, identities)
    stages = _open_stages(run, train)
    if corpus_identities(run) != identities:
        raise DataError("a corpus was replaced while it was opened; start the run again")
    epochs = stream_epochs(run, train)
    unknown = unknown_tokenizer_warning(tokenizers)
    return Inputs(
        train=train,
        stages=stages,
        identities=identities,
        contents=data_contents(run, identities, tokenizer),
        epochs=epochs,
        warnings=(*filter(None, (unknown,)), *epoch_warnings(run, epochs)),
    )


def _open_stages(run: RunConfig, train: StageStreams) -> tuple[StageInputs, ...]:
    """Return the readers of each stage; stages with equal sequences share those of validation."""
    opened: dict[str, dict[str, ValidationSet]] = {}
    stages = []
    for stage, own in zip(run.stages, train.readers, strict=True):
        key = stage.data.model_dump_json(exclude={"train", "corpus_position"})
        key += stage.validation.model_dump_json(include={"tokens"})
        if key not in opened:
            opened[key] = {name: _open_validation(run, stage, name) for name in run.data.validation}
        readers = [each.reader for each in opened[key].values()]
        stages.append(StageInputs(validation=opened[key], fixed=next(iter(readers), own)))
    return tuple(stages)


def _open_validation(run: RunConfig, stage: StageConfig, name: str) -> ValidationSet:
    length = stage.data.sequence_length
    reader = open_reader(run, stage, run.data.validation[name], shuffle=False)
    tokens = reader.stream.epoch_tokens
    sequences = min(-(-stage.validation.tokens // length), tokens // length)
    if sequences == 0:
        key = "data.validation" + ("" if name == UNNAMED_SET else f".{name}")
        raise DataError(f"{key} holds {tokens} tokens, less than a sequence of {length}")
    return ValidationSet(reader, sequences)


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
    checks: list[Callable[[], object]] = []
    opened: set[tuple[Path, int, bool]] = set()
    for stage, corpora, shuffle in (
        *((stage, stage.data.train, True) for stage in run.stages),
        *((stage, [*chain(*data.validation.values())], False) for stage in run.stages),
    ):
        for corpus in corpora:
            if (name := (corpus.path, stage.data.sequence_length, shuffle)) not in opened:
                checks.append(partial(_open_alone, run, stage, corpus, shuffle))
                opened.add(name)
    if data.tokenizer is not None:
        checks.append(partial(check_tokenizer, data.tokenizer, run.stages[0].model.vocab_size))
    found = [problem for check in checks for problem in _problem(check)]
    if found:
        return None, found
    try:
        return open_inputs(run), []
    except (InputError, OSError) as error:
        return None, [str(error)]


def _open_alone(
    run: RunConfig, stage: StageConfig, corpus: CorpusConfig, shuffle: bool
) -> BatchReader:
    corpus_identity(corpus.path)
    return open_reader(run, stage, [corpus], shuffle)


def _problem(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except (InputError, OSError) as error:
        return [str(error)]
    return []
