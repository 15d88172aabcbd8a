"""SentencePiece models: tokenizer and training."""

import io
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

import sentencepiece

from megagrow.common.atomic_files import atomic_file
from megagrow.common.json_text import read_limited
from megagrow.common.untrusted_values import check_option
from megagrow.data.hugging_face_tokenizers import (
    MOST_IDS,
    TOKENIZER_BYTES,
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


class SentencePieceTokenizer:
    """SentencePiece model. Decoding restores the text except for U+2581, its whitespace symbol."""

    def __init__(self, path: Path) -> None:
        model = read_limited(path, TOKENIZER_BYTES, DataError)
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

    def normalize(self, text: str) -> str:
        return str(self._processor.normalize(text))

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
        if limit := re.search(r"value <= (\d+)", reason):
            reason = f"use at most {limit[1]}, or more text"
        raise ConfigError(f"vocab_size {vocab_size} does not fit the corpus: {reason}") from error
    with atomic_file(model_path) as partial:
        partial.write_bytes(model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            yield from (line[i : i + MAX_LINE] for i in range(0, len(line), MAX_LINE))
