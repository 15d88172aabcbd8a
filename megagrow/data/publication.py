"""Publication of a prepared corpus: all its files replace those of the previous one together.

The parts are merged in OUTPUT/staged. Then OUTPUT/manifest.json is replaced by a marker, the files
are renamed, and the manifest replaces the marker. A reader finds the previous corpus, the new one,
or the marker, which it refuses. After a kill at any point, the next preparation under the lock
completes a publication that has its marker and removes everything else.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import numpy as np

from megagrow.common.atomic_files import remove, sync
from megagrow.common.directory_lock import DirectoryLock
from megagrow.data.indexed import IndexedCorpus, IndexedWriter, smallest_dtype, with_suffix
from megagrow.data.manifest import NAME, CorpusManifest, Replacement, Split
from megagrow.data.part_files import SPLITS, TRAIN, VALIDATION, Options, add, finished_part
from megagrow.errors import ConfigError, DataError, ResourceError

STAGED = "staged"
_LEFTOVER = re.compile(r".+\.\d+\.partial")
"""Temporary files of killed processes, see `atomic_files.partial_path`."""


@dataclass(frozen=True)
class MergedParts:
    """Contents of the corpora that are merged from parts."""

    splits: dict[str, Split]
    skipped: dict[str, int]
    """Number of documents that are not in the corpora, by reason."""
    is_divided: bool
    """True if validation consists of the last tokens instead of selected documents."""


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Convert OSError (disk full, missing permission) to ResourceError."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{error.filename or output}: {error.strerror or error}") from error


@contextmanager
def open_output(output: Path) -> Iterator[None]:
    """Lock the folder of a corpus, and complete or remove what killed processes left there.

    Raises ResourceError if another process holds the lock, DataError if the manifest of an
    interrupted publication is damaged, and OSError.
    """
    with DirectoryLock(output, "prepares this corpus", "--output", temporary=True):
        _recover(output)
        yield


def finished_corpus(output: Path, fingerprint: str, overwrite: bool) -> CorpusManifest | None:
    """Return the manifest of the folder if it is the complete corpus of this fingerprint.

    Returns None if the corpus is to be written. Raises ConfigError if it would replace another one
    and `overwrite` is not set; a damaged corpus of the same fingerprint may be replaced.
    """
    advice = "remove it, choose another path, or pass --overwrite to replace it"
    try:
        found = CorpusManifest.next_to(output / NAME)
    except DataError as error:
        if overwrite:
            return None
        raise ConfigError(f"{error}, or pass --overwrite") from error
    if found is not None and found.fingerprint == fingerprint:
        return found if found.is_complete(output) else None
    if overwrite:
        return None
    if found is not None:
        raise ConfigError(
            f"{output}: already exists, prepared from other sources, options or another tokenizer; "
            + advice
        )
    for path in (output / NAME, *_corpora(output)):
        if path.exists():
            raise ConfigError(f"{path}: already exists, not written by megagrow prepare; {advice}")
    return None


def stage_corpus(output: Path) -> Path:
    """Create the empty folder for the files of a new corpus and return it."""
    staged = output / STAGED
    remove(staged)
    staged.mkdir()
    return staged


def publish_corpus(output: Path, manifest: CorpusManifest) -> None:
    """Replace the corpus of the folder by the staged one, of which `manifest` is the manifest."""
    for name in manifest.files:
        sync(output / STAGED / name)
    previous = None
    with suppress(DataError):  # a damaged manifest is overwritten
        previous = CorpusManifest.next_to(output / NAME)
    names = set(previous.files if previous else ()) | {path.name for path in _corpora(output)}
    obsolete = sorted(names - manifest.files.keys())
    replacement = Replacement(manifest=manifest, obsolete=obsolete)
    replacement.write(output)
    _complete(output, replacement)


def _complete(output: Path, replacement: Replacement) -> None:
    """Rename the staged files that are not yet renamed, and replace the marker by the manifest."""
    for name in replacement.manifest.files:
        staged, path = output / STAGED / name, output / name
        if staged.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(path)
    for path in (output / name for name in replacement.obsolete):
        path.unlink(missing_ok=True)
        with suppress(OSError):  # other files remain in the folder
            path.parent.rmdir()
    for folder in {(output / name).parent for name in replacement.manifest.files}:
        sync(folder)
    replacement.manifest.write(output)
    remove(output / STAGED)


def _recover(output: Path) -> None:
    """Complete an interrupted publication and remove the files of killed processes."""
    replacement = Replacement.of(output)
    if replacement is not None:
        _complete(output, replacement)
    remove(output / STAGED)
    for path in output.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink()


def _corpora(output: Path) -> Iterator[Path]:
    """Yield the paths that corpora and masks of a folder may have."""
    for name, mask, suffix in product(SPLITS, ("", ".mask"), (".bin", ".idx")):
        yield output / f"{name}{mask}{suffix}"


def merge_parts(
    folder: Path, names: list[str], output: Path, options: Options, vocab_size: int
) -> MergedParts:
    """Merge the parts of these names, in their order, into OUTPUT/train and OUTPUT/validation.

    If a validation corpus is wanted and the selection of documents leaves one of the corpora
    empty, validation is the last `validation_fraction` of the tokens, at least one, and train the
    rest; a document may be divided. Raises DataError if there is no document.
    """
    finished = {name: finished_part(folder, name, vocab_size) for name in names}
    parts = {name: part for name, part in finished.items() if part is not None}
    assert len(parts) == len(finished), "a part is missing after all parts were built"
    skipped: Counter[str] = Counter()
    for name in names:
        skipped.update(parts[name].skipped)
    totals = {split: _total([parts[name].splits[split] for name in names]) for split in SPLITS}
    filled = {split: total for split, total in totals.items() if total.documents}
    if not filled:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
        listed = f"; skipped documents: {reasons}" if reasons else ""
        raise DataError(f"the sources contain no document with text{listed}")
    is_divided = options.validation_fraction > 0 and len(filled) == 1
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(IndexedWriter(output / split, smallest_dtype(vocab_size)))
            for split in (SPLITS if is_divided else filled)
        }
        if is_divided:
            (given,) = filled
            prefixes = [with_suffix(folder / name, f".{given}") for name in names]
            sizes = [parts[name].splits[given] for name in names]
            filled = _divide(prefixes, sizes, options.validation_fraction, writers)
        else:
            for split, writer in writers.items():
                for name in names:
                    writer.append(with_suffix(folder / name, f".{split}"))
        for writer in writers.values():
            writer.finalize()
    return MergedParts(filled, dict(skipped), is_divided)


def _divide(
    prefixes: list[Path],
    sizes: list[Split],
    fraction: float,
    writers: dict[str, IndexedWriter],
) -> dict[str, Split]:
    """Write the last `fraction` of the tokens of parts to validation and the others to train."""
    total = _total(sizes).tokens
    if total < 2:
        raise DataError(f"the sources contain {total} token; train and validation need at least 2")
    cut = total - min(max(round(fraction * total), 1), total - 1)
    splits = {name: Split(documents=0, tokens=0, max_token_id=-1) for name in SPLITS}
    offset = 0
    for prefix, size in zip(prefixes, sizes, strict=True):
        end = offset + size.tokens
        if end <= cut or offset >= cut:
            name = TRAIN if end <= cut else VALIDATION
            writers[name].append(prefix)
            splits[name] = _total([splits[name], size])
        else:
            for name, tokens in _divided_documents(prefix, cut - offset):
                writers[name].add_document(tokens)
                splits[name] = add(splits[name], 1, len(tokens), int(tokens.max()))
        offset = end
    return splits


def _divided_documents(prefix: Path, cut: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the documents of a part before and after a token, with the names of their splits."""
    corpus = IndexedCorpus(prefix)
    bounds = [*corpus.document_starts(0, corpus.num_tokens).tolist(), corpus.num_tokens]
    for start, stop in pairwise(bounds):
        tokens = corpus.tokens[start:stop]
        middle = min(max(cut - start, 0), stop - start)
        for name, part in ((TRAIN, tokens[:middle]), (VALIDATION, tokens[middle:])):
            if len(part):
                yield name, part


def _total(splits: Iterable[Split]) -> Split:
    total = Split(documents=0, tokens=0, max_token_id=-1)
    for split in splits:
        total = add(total, split.documents, split.tokens, split.max_token_id)
    return total
