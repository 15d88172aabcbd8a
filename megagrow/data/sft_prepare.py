"""Build a tokenized instruction corpus with a mask: `megagrow prepare-sft`.

Examples are packed into rows of the run's sequence length without being split; the rest of a row is
filled with EOS, which is masked. A row is one block of the stream, so a batch contains complete
examples, and the order of rows changes with each epoch.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from megagrow.common.tables import print_lines, table_console
from megagrow.common.untrusted_values import check_option
from megagrow.data.indexed import IndexedWriter, smallest_dtype, with_suffix
from megagrow.data.manifest import CorpusManifest, Split, corpus_files
from megagrow.data.part_files import SPLITS, TRAIN, Options, fingerprint
from megagrow.data.publication import (
    disk_errors,
    finished_corpus,
    open_output,
    publish_corpus,
    stage_corpus,
)
from megagrow.data.sft import TokenizedExample, mask_prefix, pack, read_examples, tokenize
from megagrow.data.tokenizers import Tokenizer, load_tokenizer
from megagrow.errors import ConfigError, DataError, printable

SUFFIXES = (".bin", ".idx")


@dataclass
class _Collected:
    """Examples of all files by split, with counts of truncated and dropped ones."""

    splits: dict[str, list[TokenizedExample]] = field(
        default_factory=lambda: {name: [] for name in SPLITS}
    )
    truncated: int = 0
    dropped: int = 0


def prepare_sft(
    sources: Sequence[Path],
    output: Path,
    tokenizer: str,
    sequence_length: int,
    validation_fraction: float = 0.01,
    seed: int = 1234,
    console: Console | None = None,
    overwrite: bool = False,
) -> CorpusManifest:
    """Tokenize instructions (see `sft.py`) into OUTPUT/train and OUTPUT/validation with masks.

    Rows have `sequence_length` tokens. `tokenizer` is an argument of `load_tokenizer`. The answer
    of an example that is too long is truncated; an example whose prompt alone fills the row is
    dropped. The split of an example depends on its text only. Another corpus in the folder is
    replaced only if `overwrite` is set. Prints a summary. Raises InputError.
    """
    check_option("sequence_length", sequence_length, 2, 2**24)
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"validation_fraction {validation_fraction} is not in [0, 1)")
    console, loaded = console or table_console(), load_tokenizer(tokenizer)
    options = Options(validation_fraction, seed)
    collected = _collect(sources, loaded, sequence_length, options)
    _check_collected(collected, validation_fraction, sequence_length)
    identity = fingerprint(_digests(sources), options, loaded.checksum, sequence_length)
    with disk_errors(output), open_output(output):
        finished = finished_corpus(output, identity, overwrite)
        if finished is not None:
            print_lines(console, [f"{output}: complete and unchanged, nothing to do"])
            return finished
        staged, splits = stage_corpus(output), {}
        for name, examples in collected.splits.items():
            if examples:
                splits[name], summary = _write(staged / name, examples, sequence_length, loaded)
                print_lines(console, [f"{output / name}: {summary}"])
        manifest = _describe(identity, sources, staged, splits, loaded, sequence_length)
        publish_corpus(output, manifest)
    if collected.truncated or collected.dropped:
        text = (
            f"longer than {sequence_length} tokens: {collected.truncated} answers truncated, "
            f"{collected.dropped} examples dropped because their prompt alone does not fit"
        )
        print_lines(console, [text])
    return manifest


def _collect(
    sources: Sequence[Path], tokenizer: Tokenizer, length: int, options: Options
) -> _Collected:
    collected = _Collected()
    for path in sources:
        for example in read_examples(path):
            tokens = tokenize(tokenizer, example)
            if tokens.prompt >= length:
                collected.dropped += 1
                continue
            collected.truncated += len(tokens.ids) > length
            split = options.split_of(example.prompt + example.answer)
            collected.splits[split].append(TokenizedExample(tokens.ids[:length], tokens.prompt))
    return collected


def _check_collected(collected: _Collected, validation_fraction: float, length: int) -> None:
    examples = sum(map(len, collected.splits.values()))
    if not examples:
        raise DataError(
            f"no example has a prompt shorter than {length} tokens ({collected.dropped} dropped); "
            "raise the sequence length"
        )
    for name, kept in collected.splits.items():
        if not kept and (name == TRAIN or validation_fraction > 0):
            raise DataError(
                f"validation_fraction = {validation_fraction} of {examples} examples leaves none "
                f"for {name}; change it"
            )


def _write(
    prefix: Path, examples: list[TokenizedExample], length: int, tokenizer: Tokenizer
) -> tuple[Split, str]:
    """Write tokens and mask of a split, row by row; returns its contents and a summary."""
    rows = pack([len(example.ids) for example in examples], length)
    dtype = smallest_dtype(tokenizer.vocab_size)
    with (
        IndexedWriter(prefix, dtype) as tokens,
        IndexedWriter(mask_prefix(prefix), np.dtype("<u1")) as mask,
    ):
        for row in rows:
            for example in (examples[item] for item in row):
                tokens.add_document(np.array(example.ids))
                mask.add_document(np.arange(len(example.ids)) >= example.prompt)
            rest = length - sum(len(examples[item].ids) for item in row)
            if rest:
                tokens.add_document(np.full(rest, tokenizer.eos_id))
                mask.add_document(np.zeros(rest))
        tokens.finalize()
        mask.finalize()
    total = len(rows) * length
    filled = sum(len(example.ids) for example in examples)
    answers = filled - sum(example.prompt for example in examples)
    summary = (
        f"{len(examples):,} examples in {len(rows):,} rows of {length} tokens, "
        f"{total:,} in total; {answers / total:.1%} of the tokens are answer, "
        f"{1 - filled / total:.1%} padding"
    )
    largest = max(tokenizer.eos_id, *(max(example.ids) for example in examples))
    return Split(documents=len(examples), tokens=total, max_token_id=largest), summary


def _digests(sources: Sequence[Path]) -> list[str]:
    digests = []
    for path in sources:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16))
        digests.append(digest.hexdigest())
    return digests


def _describe(
    identity: str,
    sources: Sequence[Path],
    output: Path,
    splits: dict[str, Split],
    tokenizer: Tokenizer,
    length: int,
) -> CorpusManifest:
    """Save the tokenizer with the corpus and return the manifest."""
    saved = tokenizer.save(output)
    prefixes = [at for name in splits for at in (output / name, mask_prefix(output / name))]
    corpora = [with_suffix(prefix, suffix) for prefix in prefixes for suffix in SUFFIXES]
    main = saved[0] if saved[0].parent == output else saved[0].parent
    return CorpusManifest(
        fingerprint=identity,
        sources=[printable(os.fspath(path)) for path in sources],
        tokenizer=str(main.relative_to(output)),
        tokenizer_checksum=tokenizer.checksum,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        sequence_length=length,
        splits=splits,
        files=corpus_files(output, (*corpora, *saved)),
    )
