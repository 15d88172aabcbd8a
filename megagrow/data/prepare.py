"""Build a tokenized corpus from text: `megagrow prepare`.

The sources are split into units, workers tokenize each unit into a part file, and the parts are
merged in the order of the units. The result depends on sources and options only, not on the number
of workers or on interruptions: rerunning the command resumes from the existing parts.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from megagrow.common.atomic_files import remove
from megagrow.common.progress import TokenizingProgress
from megagrow.common.tables import print_lines, table_console
from megagrow.data.indexed import with_suffix
from megagrow.data.manifest import CorpusManifest, corpus_files
from megagrow.data.part_files import (
    SPLITS,
    TRAIN,
    MergedParts,
    Options,
    Progress,
    discard_stale,
    fingerprint,
    finished_part,
    merge_parts,
    part_name,
    start_tokenizing,
)
from megagrow.data.publication import (
    disk_errors,
    finished_corpus,
    open_output,
    publish_corpus,
    stage_corpus,
)
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.data.sources.documents import Filter, RecordOptions, read_documents
from megagrow.data.sources.folders import Selection, Skipped
from megagrow.data.sources.units import TEXT_KEY, SourceUnit, find_sources
from megagrow.data.tokenizers import Tokenizer, check_tokenizer, load_tokenizer
from megagrow.data.workers import TaskFunction, run_tasks
from megagrow.errors import ConfigError, DataError, printable

TRAIN_TOKENIZER = "train"
DEFAULT_VOCAB_SIZE = 32_000
SAMPLE_BYTES_PER_TOKEN = 4096
"""Bytes of training text per token of the vocabulary: 131 MB for 32,000 tokens."""
SAMPLE_UNITS = 256
"""The sample is taken from the starts of at least this many units, spread over the corpus."""
LISTED = 10
"""Skipped files listed for each reason."""


def prepare(
    sources: list[str],
    output: Path,
    tokenizer: str,
    vocab_size: int | None = None,
    validation_fraction: float = 0.01,
    workers: int | None = None,
    text_key: str = TEXT_KEY,
    seed: int = 1234,
    console: Console | None = None,
    overwrite: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    filters: Sequence[str] = (),
    skip_invalid: bool = False,
) -> CorpusManifest:
    """Tokenize sources into OUTPUT/train and OUTPUT/validation.

    Args:
        sources: files, folders, `python-stdlib` or `hf:NAME`.
        output: folder of the corpus.
        tokenizer: `train` (SentencePiece with `vocab_size` tokens) or an argument of
            `load_tokenizer`, with at most `vocab_size` tokens.
        validation_fraction: fraction of documents in the validation corpus; 0 writes none. If no
            document or every one is selected, the last tokens are the validation corpus.
        workers: number of processes; default: one per core.
        text_key: JSON key or column of the text; with dots, of a nested value.
        overwrite: replace another corpus in the folder, which is refused otherwise.
        include: patterns of the files of a folder to read, see `Selection`; default: all.
        exclude: patterns of the files of a folder to skip.
        filters: conditions on records, KEY=VALUE or KEY!=VALUE, that all must hold.
        skip_invalid: skip records without a valid text, which are refused otherwise.

    Raises InputError. Ctrl-C keeps the finished parts.
    """
    _check_options(sources, output, validation_fraction, workers)
    console = console or table_console()
    records = RecordOptions(text_key, tuple(map(Filter.parse, filters)), skip_invalid)
    options = Options(validation_fraction, seed, records)
    chosen = Selection(tuple(include), tuple(exclude)) if include or exclude else None
    with disk_errors(output):
        found = find_sources(sources, text_key, chosen)
        units = found.units
        wanted = fingerprint(units, options, _identity(tokenizer, vocab_size))
    with disk_errors(output), open_output(output):
        finished = finished_corpus(output, wanted, overwrite)
        folder = output / "parts"
        if finished is not None:
            remove(folder)  # left by an interruption just before removal
            print_lines(console, [f"{output}: complete and unchanged, nothing to do"])
            return finished
        print_lines(console, _skipped_files(found.skipped))
        folder.mkdir(exist_ok=True)
        is_own = tokenizer == TRAIN_TOKENIZER
        if is_own:
            tokenizer = str(folder / f"{wanted}.model")
            _train_tokenizer(Path(tokenizer), units, options, vocab_size, console)
        loaded = load_tokenizer(tokenizer, is_tried=is_own)
        names = [part_name(unit, options, loaded) for unit in units]
        discard_stale(folder, [*names, wanted])
        start = partial(start_tokenizing, options, tokenizer, folder)
        by_name = dict(zip(names, units, strict=True))
        _tokenize(folder, by_name, start, loaded.vocab_size, workers, console)
        staged = stage_corpus(output)
        merged = merge_parts(folder, names, staged, options, loaded.vocab_size)
        manifest = _describe(wanted, sources, staged, merged, loaded)
        publish_corpus(output, manifest)
        remove(folder)
    print_lines(console, _summary(output, merged))
    return manifest


def _check_options(
    sources: list[str], output: Path, validation_fraction: float, workers: int | None
) -> None:
    if not sources:
        raise ConfigError("no sources given; name at least one file, folder or dataset")
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"validation_fraction {validation_fraction} is not in [0, 1)")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers = {workers}; use at least 1")
    for source in sources:
        if Path(source).is_dir() and output.resolve().is_relative_to(Path(source).resolve()):
            raise ConfigError(f"{output}: is inside the source {source}; choose another output")


def _identity(tokenizer: str, vocab_size: int | None) -> str:
    """Return the identity of a tokenizer before it is trained. DataError if it is too large."""
    if tokenizer == TRAIN_TOKENIZER:
        return f"{TRAIN_TOKENIZER} {vocab_size or DEFAULT_VOCAB_SIZE}"
    if vocab_size is not None:
        check_tokenizer(tokenizer, vocab_size)
    return load_tokenizer(tokenizer).checksum


def _train_tokenizer(
    path: Path, units: list[SourceUnit], options: Options, vocab_size: int | None, console: Console
) -> None:
    """Train a tokenizer on a sample of the corpus unless a previous run has done so."""
    if path.is_file():
        return
    size = vocab_size or DEFAULT_VOCAB_SIZE
    limit = size * SAMPLE_BYTES_PER_TOKEN
    sample = list(_sample(units, options, limit)) or list(_sample(units, options, limit, SPLITS))
    if not sample:
        raise DataError("the sources contain no document with text")
    megabytes = sum(map(len, sample)) / 1e6
    with console.status("training the tokenizer"):
        text = f"training a tokenizer of {size:,} tokens on {megabytes:.1f} MB of text"
        print_lines(console, [text])
        train_sentencepiece(sample, size, path)


def _sample(
    units: list[SourceUnit], options: Options, limit: int, splits: Sequence[str] = (TRAIN,)
) -> Iterator[str]:
    """Yield about `limit` characters of the documents of `splits` from across the corpus."""
    chosen = units[:: max(1, len(units) // SAMPLE_UNITS)]
    for unit in chosen:
        room = limit // len(chosen)
        for document in read_documents(unit, options.records):
            if options.split_of(document.text) in splits:
                yield document.text[:room]
                room -= len(document.text)
            if room <= 0:
                break


def _tokenize(
    folder: Path,
    units: dict[str, SourceUnit],
    start: Callable[[], TaskFunction[SourceUnit, Progress]],
    vocab_size: int,
    workers: int | None,
    console: Console,
) -> None:
    """Build the missing parts; `units` are keyed by the names of their parts."""
    parts = {name: finished_part(folder, name, vocab_size) for name in units}
    pending = [unit for name, unit in units.items() if parts[name] is None]
    sizes = [unit.size for unit in units.values()]
    workers = workers or len(os.sched_getaffinity(0))
    with TokenizingProgress(console, sum(sizes) if all(sizes) else None) as progress:
        for part in filter(None, parts.values()):
            progress.resume(part.bytes, part.tokens)
        try:
            for done in run_tasks(start, pending, workers):
                progress.advance(done.bytes, done.tokens)
        except KeyboardInterrupt:
            text = "interrupted; rerun the same command to resume from the finished parts"
            print_lines(console, [text])
            raise


def _describe(
    wanted: str,
    sources: list[str],
    output: Path,
    merged: MergedParts,
    tokenizer: Tokenizer,
) -> CorpusManifest:
    """Save the tokenizer with the corpus and return the manifest."""
    saved = tokenizer.save(output)
    corpora = [
        with_suffix(output / split, end) for split in merged.splits for end in (".bin", ".idx")
    ]
    main = saved[0] if saved[0].parent == output else saved[0].parent
    return CorpusManifest(
        fingerprint=wanted,
        sources=[printable(source) for source in sources],
        tokenizer=str(main.relative_to(output)),
        tokenizer_checksum=tokenizer.checksum,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        splits=merged.splits,
        skipped=merged.skipped,
        files=corpus_files(output, (*corpora, *saved)),
    )


def _skipped_files(skipped: list[Skipped]) -> Iterator[str]:
    """Yield a line for each reason for which files of the sources are skipped."""
    names: dict[str, list[str]] = {}
    for item in skipped:
        names.setdefault(item.reason, []).append(item.path)
    for reason, paths in names.items():
        more = f" and {len(paths) - LISTED:,} more" if len(paths) > LISTED else ""
        yield f"skipped {len(paths):,}: {reason}: {', '.join(paths[:LISTED])}{more}"


def _summary(output: Path, merged: MergedParts) -> Iterator[str]:
    """Yield the contents of the corpora and the number of skipped documents."""
    if merged.skipped:
        counts = (f"{count:,} {reason}" for reason, count in sorted(merged.skipped.items()))
        yield f"skipped documents: {', '.join(counts)}"
    if merged.is_divided:
        yield "too few documents for the validation fraction: the last tokens are the validation"
    for name, split in merged.splits.items():
        yield f"{output / name}: {split.documents:,} documents, {split.tokens:,} tokens"
