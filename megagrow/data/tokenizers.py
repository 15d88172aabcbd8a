"""Tokenizers: SentencePiece models and Hugging Face tokenizers (extra `hf`).

No tokenizer adds special tokens or parses them from text: "</s>" in a document does not end it.
"""

import io
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

import sentencepiece

from megagrow.common.atomic_files import atomic_file
from megagrow.common.untrusted_values import check_option
from megagrow.data.hugging_face_tokenizers import (
    MOST_IDS,
    JsonTokenizer,
    TransformersTokenizer,
    checksum_of,
    copy_file,
    find_eos,
    no_eos,
)
from megagrow.errors import ConfigError, DataError

PIECE_LENGTH = 2048
"""Characters, rounded up to a line end, passed to SentencePiece at a time so that its tables
stay in cache: 40% faster on source code, almost 4x on one text of 20 MB."""

MAX_LINE = 4096
"""Maximum line length in characters for tokenizer training; longer lines are split."""

FOLDER_FILES = ("tokenizer.json", "tokenizer.model")

PROBE = """The quick brown fox jumps over 13 lazy dogs; it doesn't pay $1,234.56 (or 7%) for them.
def mean(values: list[float]) -> float:
    return sum(values) / len(values)  # raises ZeroDivisionError
Internationalization, photosynthesis, unbelievable misunderstandings: https://example.org/a?b=c_d
Der Zug f\u00e4hrt \u00fcber die Br\u00fccke. \u2211x\u00b2 \u2264 1
\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u4f60\u597d\uff0c\u4e16\u754c\u3002
\u3053\u3093\u306b\u3061\u306f \u0645\u0631\u062d\u0628\u0627"""
"""Text that different tokenizers encode differently."""


class Tokenizer(Protocol):
    """Tokenizer interface used by megagrow."""

    vocab_size: int
    """Upper bound (exclusive) of token ids."""
    eos_id: int
    """Token that ends a document."""
    checksum: str
    """Hexadecimal identity of the tokenizer."""
    supports_windows: bool
    """True if `encode_document` may encode a long text in windows; False for Unigram models, where
    the choice between segmentations of equal score depends on rounding over the complete text."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""

    def save(self, folder: Path) -> list[Path]:
        """Write the files needed to load the tokenizer and return them, the main file first."""


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load a SentencePiece .model, a tokenizer.json, or a folder or name known to transformers.

    Raises DataError if it is missing, invalid, or has no EOS token.
    """
    path = Path(name)
    if path.suffix not in (".model", ".json"):
        return TransformersTokenizer(str(name))
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file")
    return SentencePieceTokenizer(path) if path.suffix == ".model" else JsonTokenizer(path)


def tokenizers_at(path: Path) -> Iterator[Tokenizer]:
    """Yield the tokenizers that a path contains: a file's, or those of the files of a folder.

    The same tokenizer in two formats has two checksums. Raises DataError if it is invalid.
    """
    if path.is_dir():
        files = (path / name for name in FOLDER_FILES)
        yield from (load_tokenizer(file) for file in files if file.is_file())
    yield load_tokenizer(path)


def gives_same_ids(first: Tokenizer, second: Tokenizer) -> bool:
    """Return True if two tokenizers are equal, or encode a probe of many kinds of text equally."""
    if first.checksum == second.checksum:
        return True
    return first.encode_batch([PROBE]) == second.encode_batch([PROBE])


def check_tokenizer(name: str | Path, vocab_size: int) -> Tokenizer:
    """Load a tokenizer; raise DataError if it has more than `vocab_size` tokens."""
    tokenizer = load_tokenizer(name)
    own = tokenizer.vocab_size
    if own > vocab_size:
        raise DataError(
            f"{name}: the tokenizer has {own} tokens, more than the model's vocab_size "
            f"{vocab_size}; set vocab_size to at least {own}"
        )
    return tokenizer


class SentencePieceTokenizer:
    """SentencePiece model. Decoding restores the text except for U+2581, its whitespace symbol."""

    def __init__(self, path: Path) -> None:
        model = path.read_bytes()
        if not model:
            raise DataError(f"{path}: not a SentencePiece model, the file is empty")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.vocab_size()
            self.supports_windows = self._is_byte_pair_encoding()
            self._is_splittable = self.supports_windows and self._check_splittable()
        except (RuntimeError, ValueError) as error:  # ValueError: a token that is not UTF-8.
            raise DataError(f"{path}: not a SentencePiece model") from error
        self._path = path
        self.eos_id, self._eos_files = self._find_eos()
        declared = [str(self.eos_id).encode()] if self._processor.eos_id() < 0 else []
        self.checksum = checksum_of(model, *declared)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        pieces = [self._split(text) for text in texts]
        flat = list(chain.from_iterable(pieces))
        encoded = iter(self._processor.encode(flat, out_type=int, num_threads=1))
        return [list(chain.from_iterable(islice(encoded, len(parts)))) for parts in pieces]

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))

    def save(self, folder: Path) -> list[Path]:
        model = copy_file(self._path, folder / "tokenizer.model")
        return [model, *(copy_file(path, folder / path.name) for path in self._eos_files)]

    def _find_eos(self) -> tuple[int, tuple[Path, ...]]:
        """Return the model's EOS token, or that of the files next to it, and these files."""
        if (own := self._processor.eos_id()) >= 0:
            return own, ()
        eos = find_eos(self._path, self._id_of, self.vocab_size)
        if eos is None:
            raise no_eos(self._path)
        return eos.token_id, eos.files

    def _id_of(self, piece: str) -> int | None:
        number = self._processor.piece_to_id(piece)
        return number if self._processor.id_to_piece(number) == piece else None

    def _split(self, text: str) -> list[str]:
        """Split at newlines if encoding the pieces separately yields the same tokens."""
        if len(text) <= PIECE_LENGTH or not self._is_splittable:
            return [text]
        pieces, start = [], 0
        while start < len(text):
            stop = text.find("\n", start + PIECE_LENGTH) + 1 or len(text)
            pieces.append(text[start:stop])
            start = stop
        return pieces

    def _check_splittable(self) -> bool:
        """Return True if no token spans a newline and text ends are left unchanged."""
        encode, size = self._processor.encode, range(self.vocab_size)
        if any("\n" in piece for piece in self._processor.id_to_piece(list(size))):
            return False
        if self.decode(encode("a\n\na")) != "a\n\na":  # newlines are normalized to spaces
            return False
        return bool(encode(" a \n a ") == encode(" a \n") + encode(" a "))

    def _is_byte_pair_encoding(self) -> bool:
        """Return True if the scores are ranks of merges; those of other models are logarithms."""
        scores = map(self._processor.get_score, range(self.vocab_size))
        return all(score.is_integer() for score in scores)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_path: Path) -> None:
    """Train a byte-pair encoding on texts and write it atomically to `model_path`.

    Unknown characters fall back to bytes, digits are single tokens, spaces and newlines are
    preserved; ids as in Llama: unk 0, bos 1, eos 2. Equal texts produce equal files.
    """
    check_option("vocab_size", vocab_size, 1, MOST_IDS)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            max_sentence_length=4 * MAX_LINE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # stored in the model, so it affects the checksum
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().rsplit("] ", 1)[-1].replace("\n", " ")
        raise ConfigError(f"vocab_size {vocab_size} does not fit the corpus: {reason}") from error
    with atomic_file(model_path) as partial:
        partial.write_bytes(model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            yield from (line[i : i + MAX_LINE] for i in range(0, len(line), MAX_LINE))
