"""Part files: the tokens of one unit, made by workers and merged into the corpus.

A part is named by a fingerprint of its unit and all other inputs, so an existing part is always
valid and can be reused by any later preparation; parts with other names are stale.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from megagrow.common.atomic_files import write_text
from megagrow.common.json_text import FILE_BYTES, read_limited
from megagrow.common.untrusted_values import check_option
from megagrow.data.document_encoding import encode_document, is_long
from megagrow.data.indexed import IndexedCorpus, IndexedWriter, smallest_dtype, with_suffix
from megagrow.data.manifest import Split
from megagrow.data.sources.documents import Document, RecordOptions, read_documents
from megagrow.data.sources.units import SourceUnit
from megagrow.data.tokenizers import Tokenizer, load_tokenizer
from megagrow.errors import DataError

TRAIN, VALIDATION = SPLITS = ("train", "validation")
BATCH_BYTES = 1 << 20
"""Characters of input tokenized at a time."""


@dataclass(frozen=True)
class Options:
    """Options that determine the corpus, in addition to sources and tokenizer."""

    validation_fraction: float
    seed: int
    records: RecordOptions = field(default_factory=RecordOptions)

    def __post_init__(self) -> None:
        check_option("seed", self.seed, -(2**63), 2**63 - 1)

    def split_of(self, text: str) -> str:
        """Return the split of a document, a function of its content: duplicates stay together."""
        key = self.seed.to_bytes(16, "little", signed=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
        is_validation = int.from_bytes(digest, "little") < self.validation_fraction * 2.0**64
        return VALIDATION if is_validation else TRAIN


class PartFile(BaseModel):
    """JSON file of a part, written last: contents of `NAME.train` and `NAME.validation`."""

    splits: dict[str, Split]
    bytes: int
    """Bytes of input."""
    skipped: dict[str, int]
    """Number of documents that are not in the corpus, by reason."""

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())


@dataclass(frozen=True)
class MergedParts:
    """Contents of the corpora that are merged from parts."""

    splits: dict[str, Split]
    skipped: dict[str, int]
    """Number of documents that are not in the corpora, by reason."""
    is_divided: bool
    """True if validation consists of the last tokens instead of selected documents."""


@dataclass(frozen=True)
class Progress:
    """Work done since the previous message."""

    bytes: int
    tokens: int


def fingerprint(*values: object) -> str:
    """Return a hexadecimal fingerprint of plain values, equal in every process."""
    return hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()


def part_name(unit: SourceUnit, options: Options, tokenizer: Tokenizer) -> str:
    """Return the name of a unit's part."""
    return fingerprint(unit, options, tokenizer.checksum)


def finished_part(folder: Path, name: str, vocab_size: int) -> PartFile | None:
    """Return the part of this name, or None if it is absent or incomplete."""
    path = folder / f"{name}.json"
    try:
        part = PartFile.model_validate_json(read_limited(path, FILE_BYTES, DataError))
        sizes = {s: with_suffix(folder / name, f".{s}.bin").stat().st_size for s in SPLITS}
    except (FileNotFoundError, ValidationError):
        return None
    itemsize = smallest_dtype(vocab_size).itemsize
    complete = all(sizes[split] == part.splits[split].tokens * itemsize for split in SPLITS)
    return part if complete else None


def discard_stale(folder: Path, names: Iterable[str]) -> None:
    """Remove files of the folder that do not belong to a part or model of these names."""
    wanted = set(names)
    for path in folder.iterdir():
        if path.suffix == ".partial" or path.name.split(".")[0] not in wanted:
            path.unlink()


def start_tokenizing(
    options: Options, tokenizer: str, folder: Path
) -> Callable[[SourceUnit], Iterator[Progress]]:
    """Load the tokenizer and return a function that builds a unit's part and yields progress."""
    return partial(make_part, options, load_tokenizer(tokenizer, is_tried=True), folder)


def make_part(
    options: Options, tokenizer: Tokenizer, folder: Path, unit: SourceUnit
) -> Iterator[Progress]:
    """Tokenize one unit into the folder; yields progress after each batch."""
    prefix = folder / part_name(unit, options, tokenizer)
    dtype = smallest_dtype(tokenizer.vocab_size)
    splits = {name: Split(documents=0, tokens=0, max_token_id=-1) for name in SPLITS}
    skipped: Counter[str] = Counter()
    done = 0
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(with_suffix(prefix, f".{name}"), dtype))
            for name in SPLITS
        }
        for batch in _batches(read_documents(unit, options.records, skipped)):
            before = sum(split.tokens for split in splits.values())
            for text, ids in zip(batch.texts, _encode_batch(tokenizer, batch.texts), strict=True):
                name = options.split_of(text)
                document = np.append(ids, tokenizer.eos_id)
                writers[name].add_document(document)
                splits[name] = add(splits[name], 1, len(document), int(document.max()))
            tokens = sum(split.tokens for split in splits.values()) - before
            done += batch.size
            yield Progress(batch.size, tokens)
        for writer in writers.values():
            writer.finalize()
    part = PartFile(splits=splits, bytes=done, skipped=skipped)
    write_text(with_suffix(prefix, ".json"), part.model_dump_json())


def add(split: Split, documents: int, tokens: int, max_token_id: int) -> Split:
    """Return a split extended by more documents and tokens."""
    return Split(
        documents=split.documents + documents,
        tokens=split.tokens + tokens,
        max_token_id=max(split.max_token_id, max_token_id),
    )


@dataclass(frozen=True)
class _Batch:
    texts: list[str]
    size: int


def _batches(documents: Iterable[Document]) -> Iterator[_Batch]:
    """Yield batches of about BATCH_BYTES characters; a long document is a batch by itself."""
    texts: list[str] = []
    size = length = 0
    for document in documents:
        if texts and is_long(document.text):
            yield _Batch(texts, size)
            texts, size, length = [], 0, 0
        texts.append(document.text)
        size += document.size
        length += len(document.text)
        if length >= BATCH_BYTES or is_long(document.text):
            yield _Batch(texts, size)
            texts, size, length = [], 0, 0
    if texts:
        yield _Batch(texts, size)


def _encode_batch(tokenizer: Tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    """Yield the tokens of the documents of a batch, int32."""
    if len(texts) == 1:
        yield encode_document(tokenizer, texts[0])
        return
    for ids in tokenizer.encode_batch(texts):
        yield np.array(ids, dtype=np.int32)


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
