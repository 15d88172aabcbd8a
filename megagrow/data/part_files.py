"""Part files: the tokens of one unit, kept until the corpus is complete.

A part is named by a fingerprint of its unit and all other inputs, so an existing part is always
valid and can be reused by any later preparation; parts with other names are stale.

Long documents are encoded in bounded memory. Consecutive windows of the text overlap. The overlap
is also encoded by itself, and the tokens on which all three encodings agree locate a seam: the
tokens before it are taken from the left window, those after it from the right one. At both ends of
the overlap some tokens differ, because a window cuts a word or starts with the space that a
tokenizer adds; the seam keeps a distance from them.

The result is exact for byte-pair encoding: a sequence of tokens is the encoding of its text if each
pair of adjacent tokens is that of its own, and every pair occurs in one of the windows. A window
starts at the start of a line, a word or a number, so a pre-tokenizer splits the rest of the text as
in the complete document. Where the encodings do not agree, the window is enlarged, if necessary to
the complete document.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from megagrow.common.atomic_files import write_text
from megagrow.common.json_text import FILE_BYTES, read_limited
from megagrow.common.untrusted_values import check_option
from megagrow.data.indexed import IndexedWriter, smallest_dtype, with_suffix
from megagrow.data.manifest import Split
from megagrow.data.sources.documents import Document, RecordOptions, read_documents
from megagrow.data.sources.units import SourceUnit
from megagrow.data.tokenizers import Tokenizer, load_tokenizer
from megagrow.errors import DataError

TRAIN, VALIDATION = SPLITS = ("train", "validation")
BATCH_BYTES = 1 << 20
"""Characters of input tokenized at a time."""


WINDOW = 1 << 16
"""Characters encoded at a time; the fastest size for tokenizers without a pre-tokenizer."""

OVERLAP = 1 << 12
"""Characters that consecutive windows share, at least half of them."""

MARGIN = 8
"""Tokens before and after a seam on which the encodings must agree."""

LONG = 1 << 18
"""Length in characters from which a document is encoded in windows."""

_LINE = re.compile(r"(?<=\n)(?=\S)")
_WORD = re.compile(
    r"(?<=\s)(?=\S)|(?<=\w)(?=[^\w\s])|(?<=[^\w\s])(?=\w)|(?<=\d)(?=[^\W\d])|(?<=[^\W\d])(?=\d)"
)


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
        if texts and len(document.text) >= LONG:
            yield _Batch(texts, size)
            texts, size, length = [], 0, 0
        texts.append(document.text)
        size += document.size
        length += len(document.text)
        if length >= BATCH_BYTES or len(document.text) >= LONG:
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


def encode_document(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the tokens of a document, int32 [length], equal to those of `encode_batch`.

    A document shorter than LONG, or any with a tokenizer that does not support windows, is encoded
    at once.
    """
    if len(text) < LONG or not tokenizer.supports_windows:
        return _encode(tokenizer, text)
    return _encode_in_windows(tokenizer, text)


def _encode_in_windows(tokenizer: Tokenizer, text: str) -> np.ndarray:
    parts: list[np.ndarray] = []
    # `tokens` are those of the window [start, stop); the first `done` of them are in `parts`.
    start, stop = 0, min(WINDOW, len(text))
    tokens, done = _encode(tokenizer, text[:stop]), 0
    while stop < len(text):
        left = _window_start(text, start, stop)
        if left is not None:
            right = min(left + WINDOW, len(text))
            following = _encode(tokenizer, text[left:right])
            shared = _encode(tokenizer, text[left:stop])
            seam = _seam(tokens, shared, following)
            kept = 0 if seam is None else len(tokens) - len(shared) + seam
            if seam is not None and kept >= done:
                parts.append(tokens[done:kept])
                start, stop, tokens, done = left, right, following, seam
                continue
        stop = min(start + 2 * (stop - start), len(text))
        larger = _encode(tokenizer, text[start:stop])
        if not np.array_equal(larger[: done + MARGIN], tokens[: done + MARGIN]):
            return _encode(tokenizer, text)
        tokens = larger
    return np.concatenate([*parts, tokens[done:]])


def _window_start(text: str, start: int, stop: int) -> int | None:
    """Return the start of the window after [start, stop), or None if there is no suitable one."""
    first = max(stop - OVERLAP, start + 1)
    last = stop - OVERLAP // 2
    found = _LINE.search(text, first, last) or _WORD.search(text, first, last)
    return found.start() if found else None


def _seam(tokens: np.ndarray, shared: np.ndarray, following: np.ndarray) -> int | None:
    """Return the index in `shared` at which to change from `tokens` to `following`, or None.

    `shared` is the encoding of the end of the one's text and of the start of the other's.
    """
    common = min(len(tokens), len(shared))
    first = len(shared) - _common(tokens[::-1][:common], shared[::-1][:common]) + MARGIN
    common = min(len(following), len(shared))
    last = _common(following[:common], shared[:common]) - MARGIN
    return (first + last) // 2 if first <= last else None


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """Return the length of the common prefix of two arrays of equal length."""
    different = np.flatnonzero(left != right)
    return int(different[0]) if len(different) else len(left)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode_batch([text])[0], dtype=np.int32)
