"""Instructions to a tokenised corpus with a mask: `megagrow prepare-sft`.

Whole examples are packed into rows of the run's sequence length, and what is left of a row is
filled with EOS, which is no answer. A row is one block of the stream, so a batch holds whole
examples, in an order of rows that changes with each epoch.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from megagrow.data.indexed import IndexedWriter, smallest_dtype, with_suffix
from megagrow.data.manifest import NAME, CorpusManifest, Split, corpus_files
from megagrow.data.part_files import SPLITS, TRAIN, Options, fingerprint
from megagrow.data.sft import TokenisedExample, mask_prefix, pack, read_examples, tokenise
from megagrow.data.tokenizers import Tokenizer, load_tokenizer
from megagrow.errors import DataError

SUFFIXES = (".bin", ".idx")


@dataclass
class _Collected:
    """The examples of all files, and what happened to those that are too long."""

    splits: dict[str, list[TokenisedExample]] = field(
        default_factory=lambda: {name: [] for name in SPLITS}
    )
    cut: int = 0
    left_out: int = 0


def prepare_sft(
    sources: Sequence[Path],
    output: Path,
    tokenizer: str,
    sequence_length: int,
    validation_fraction: float = 0.01,
    seed: int = 1234,
    console: Console | None = None,
) -> CorpusManifest:
    """Tokenise instructions (see `sft.py`) into OUTPUT/train and OUTPUT/validation, each with its
    mask, in rows of `sequence_length` tokens, and say what came out.

    `tokenizer` is what `load_tokenizer` takes. An example that is too long is cut at the end of
    its answer; one whose prompt alone fills the sequence is left out. Which split an example goes
    to depends on its text alone. Errors: InputError.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction {validation_fraction} is not in [0, 1)")
    console, loaded = console or Console(), load_tokenizer(tokenizer)
    options = Options("", validation_fraction, seed)
    found = _collect(sources, loaded, sequence_length, options)
    _check_found(found, validation_fraction, sequence_length)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / NAME).unlink(missing_ok=True)  # of the files that are now replaced
        splits = {}
        for name, examples in found.splits.items():
            if examples:
                splits[name] = _write(output / name, examples, sequence_length, loaded, console)
            else:
                _remove(output / name)
        identity = (_digests(sources), options, loaded.checksum, sequence_length)
        manifest = _describe(identity, sources, output, splits, loaded, sequence_length)
        manifest.write(output)
    except OSError as error:
        raise DataError(f"{error.filename or output}: {error.strerror or error}") from error
    if found.cut or found.left_out:
        console.print(
            f"too long for {sequence_length} tokens: {found.cut} answers were cut, "
            f"{found.left_out} examples left out, as their prompt alone does not fit",
            soft_wrap=True,
            highlight=False,
        )
    return manifest


def _collect(
    sources: Sequence[Path], tokenizer: Tokenizer, length: int, options: Options
) -> _Collected:
    found = _Collected()
    for path in sources:
        for example in read_examples(path):
            whole = tokenise(tokenizer, example)
            if whole.prompt >= length:
                found.left_out += 1
                continue
            found.cut += len(whole.ids) > length
            split = options.split_of(example.prompt + example.answer)
            found.splits[split].append(TokenisedExample(whole.ids[:length], whole.prompt))
    return found


def _check_found(found: _Collected, validation_fraction: float, length: int) -> None:
    examples = sum(map(len, found.splits.values()))
    if not examples:
        raise DataError(
            f"no example whose prompt fits into {length} tokens ({found.left_out} do not); nothing "
            "to prepare"
        )
    for name, kept in found.splits.items():
        if not kept and (name == TRAIN or validation_fraction > 0):
            raise DataError(
                f"validation_fraction {validation_fraction} of {examples} examples leaves none for "
                f"{name}; change it"
            )


def _write(
    prefix: Path,
    examples: list[TokenisedExample],
    length: int,
    tokenizer: Tokenizer,
    console: Console,
) -> Split:
    """Both files of a split, row by row; what they hold."""
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
        tokens.finalise()
        mask.finalise()
    total = len(rows) * length
    filled = sum(len(example.ids) for example in examples)
    answers = filled - sum(example.prompt for example in examples)
    console.print(
        f"{prefix}: {len(examples):,} examples in {len(rows):,} rows of {length} tokens, "
        f"{total:,} in all; {answers / total:.1%} of the tokens are answer, "
        f"{1 - filled / total:.1%} padding",
        soft_wrap=True,
        highlight=False,
    )
    largest = max(tokenizer.eos_id, *(max(example.ids) for example in examples))
    return Split(documents=len(examples), tokens=total, max_token_id=largest)


def _remove(prefix: Path) -> None:
    for at in (prefix, mask_prefix(prefix)):
        for suffix in SUFFIXES:
            with_suffix(at, suffix).unlink(missing_ok=True)


def _digests(sources: Sequence[Path]) -> list[str]:
    return [hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in sources]


def _describe(
    identity: tuple[object, ...],
    sources: Sequence[Path],
    output: Path,
    splits: dict[str, Split],
    tokenizer: Tokenizer,
    length: int,
) -> CorpusManifest:
    """Save the tokenizer with the corpus, and describe all files."""
    saved = tokenizer.save(output)
    prefixes = [at for name in splits for at in (output / name, mask_prefix(output / name))]
    corpora = [with_suffix(prefix, suffix) for prefix in prefixes for suffix in SUFFIXES]
    main = saved[0] if saved[0].parent == output else saved[0].parent
    return CorpusManifest(
        fingerprint=fingerprint(*identity),
        sources=[os.fspath(path) for path in sources],
        tokenizer=str(main.relative_to(output)),
        tokenizer_checksum=tokenizer.checksum,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        sequence_length=length,
        splits=splits,
        files=corpus_files(output, (*corpora, *saved)),
    )
