"""Part files: the tokens of one unit, kept until the corpus is complete.

A part is named by a fingerprint of its unit and all other inputs, so an existing part is always
valid and can be reused by any later preparation; parts with other names are stale.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from megagrow.common.atomic_files import write_text
from megagrow.common.json_text import FILE_BYTES, read_limited
from megagrow.common.untrusted_values import check_option
from megagrow.data.documents import Document, read_documents
from megagrow.data.indexed import IndexedWriter, smallest_dtype, with_suffix
from megagrow.data.long_documents import LONG, encode_document
from megagrow.data.manifest import Split
from megagrow.data.sources import SourceUnit
from megagrow.data.tokenizers import Tokenizer, load_tokenizer
from megagrow.errors import DataError

TRAIN, VALIDATION = SPLITS = ("train", "validation")
BATCH_BYTES = 1 << 20
"""Characters of input tokenized at a time."""


@dataclass(frozen=True)
class Options:
    """Options that determine the corpus, in addition to sources and tokenizer."""

    text_key: str
    validation_fraction: float
    seed: int

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
    return partial(make_part, options, load_tokenizer(tokenizer), folder)


def make_part(
    options: Options, tokenizer: Tokenizer, folder: Path, unit: SourceUnit
) -> Iterator[Progress]:
    """Tokenize one unit into the folder; yields progress after each batch."""
    prefix = folder / part_name(unit, options, tokenizer)
    dtype = smallest_dtype(tokenizer.vocab_size)
    splits = {name: Split(documents=0, tokens=0, max_token_id=-1) for name in SPLITS}
    done = 0
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(with_suffix(prefix, f".{name}"), dtype))
            for name in SPLITS
        }
        for batch in _batches(read_documents(unit, options.text_key)):
            before = sum(split.tokens for split in splits.values())
            for text, ids in zip(batch.texts, _encode(tokenizer, batch.texts), strict=True):
                name = options.split_of(text)
                document = np.append(ids, tokenizer.eos_id)
                writers[name].add_document(document)
                splits[name] = add(splits[name], 1, len(document), int(document.max()))
            tokens = sum(split.tokens for split in splits.values()) - before
            done += batch.size
            yield Progress(batch.size, tokens)
        for writer in writers.values():
            writer.finalize()
    _write_json(with_suffix(prefix, ".json"), PartFile(splits=splits, bytes=done))


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


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
    """Yield the tokens of the documents of a batch, int32."""
    if len(texts) == 1:
        yield encode_document(tokenizer, texts[0])
        return
    for ids in tokenizer.encode_batch(texts):
        yield np.array(ids, dtype=np.int32)


def _write_json(path: Path, part: PartFile) -> None:
    write_text(path, part.model_dump_json())
