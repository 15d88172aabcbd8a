"""Tokenizers: SentencePiece models and Hugging Face tokenizers (extra `hf`).

No tokenizer adds special tokens or parses them from text: "</s>" in a document does not end it.
"""

import hashlib
import importlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import sentencepiece

from megagrow.common.atomic_files import atomic_file
from megagrow.common.json_text import read_json
from megagrow.errors import ConfigError, DataError, InputError, ResourceError

PIECE_LENGTH = 2048
"""Characters, rounded up to a line end, passed to SentencePiece at a time so that its tables
stay in cache: 40% faster on source code, almost 4x on one text of 20 MB."""

MAX_LINE = 4096
"""Maximum line length in characters for tokenizer training; longer lines are split."""

MOST_IDS = 2**24
"""Maximum vocabulary size."""

EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
"""EOS token names tried for a tokenizer.json without a tokenizer_config.json."""


class Tokenizer(Protocol):
    """Tokenizer interface used by megagrow."""

    vocab_size: int
    """Upper bound (exclusive) of token ids."""
    eos_id: int
    """Token that ends a document."""
    checksum: str
    """Hexadecimal identity of the tokenizer."""

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
            self._is_splittable = self._check_splittable()
        except (RuntimeError, ValueError) as error:  # ValueError: a token that is not UTF-8.
            raise DataError(f"{path}: not a SentencePiece model") from error
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise _no_eos(path)
        self.checksum = _digest(model)
        self._path = path

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        pieces = [self._split(text) for text in texts]
        flat = list(chain.from_iterable(pieces))
        encoded = iter(self._processor.encode(flat, out_type=int, num_threads=1))
        return [list(chain.from_iterable(islice(encoded, len(parts)))) for parts in pieces]

    def decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))

    def save(self, folder: Path) -> list[Path]:
        return [_copy(self._path, folder / "tokenizer.model")]

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
        return bool(encode(" a \n a ") == encode(" a \n") + encode(" a "))


class JsonTokenizer:
    """Hugging Face tokenizer.json; a tokenizer_config.json next to it names the EOS token."""

    def __init__(self, path: Path) -> None:
        library = _import("tokenizers")
        try:
            self._tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path}: not a tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._path = path
        self.vocab_size = _size_of(self._tokenizer)
        if self.vocab_size > MOST_IDS:  # the library would allocate memory for all ids and abort
            raise DataError(f"{path}: a token has the id {self.vocab_size - 1}; damaged")
        self.eos_id = self._find_eos()
        self.checksum = _digest(self._tokenizer.to_str().encode(), str(self.eos_id).encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # One text at a time: larger batches start the library's threads in every worker process.
        # encode_batch_fast skips the offsets of tokens, which takes two thirds of the time.
        encode = partial(self._tokenizer.encode_batch_fast, add_special_tokens=False)
        try:
            return [encode([text])[0].ids for text in texts]
        except Exception as error:  # as above; e.g. a vocabulary without its unknown token
            raise DataError(f"{self._path}: cannot encode a text: {error}") from error

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def save(self, folder: Path) -> list[Path]:
        saved = [_copy(self._path, folder / "tokenizer.json")]
        if self._config.is_file():
            saved.append(_copy(self._config, folder / self._config.name))
        return saved

    @property
    def _config(self) -> Path:
        return self._path.with_name("tokenizer_config.json")

    def _find_eos(self) -> int:
        names: tuple[str, ...] = EOS_NAMES
        if self._config.is_file():
            token = read_json(self._config).get("eos_token") or ""
            name = token.get("content") if isinstance(token, dict) else token
            if not isinstance(name, str):
                raise DataError(f"{self._config}: 'eos_token' must be the text of a token")
            names = (name,)
        candidates = map(self._tokenizer.token_to_id, names)
        ids: list[int] = [token_id for token_id in candidates if token_id is not None]
        if not ids:
            raise _no_eos(self._path)
        return ids[0]


class TransformersTokenizer:
    """Tokenizer of the transformers library: a folder, or a name on the Hugging Face Hub."""

    def __init__(self, name: str) -> None:
        library = _import("transformers")
        try:
            # Never run code shipped with a tokenizer.
            self._tokenizer = library.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # damaged files raise arbitrary exceptions
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise DataError(f"{name}: no tokenizer found: {reason}") from error
        if self._tokenizer.eos_token_id is None:
            raise _no_eos(name)
        self.vocab_size = _size_of(self._tokenizer)
        self.eos_id = self._tokenizer.eos_token_id
        self.checksum = _digest(self._description().encode(), str(self.eos_id).encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def save(self, folder: Path) -> list[Path]:
        self._tokenizer.save_pretrained(folder / "tokenizer")
        return sorted(path for path in (folder / "tokenizer").rglob("*") if path.is_file())

    def _encode(self, text: str) -> list[int]:
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True}
        return list(self._tokenizer(text, verbose=False, **options)["input_ids"])

    def _description(self) -> str:
        if self._tokenizer.is_fast:
            return str(self._tokenizer.backend_tokenizer.to_str())
        return json.dumps(self._tokenizer.get_vocab(), sort_keys=True)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_path: Path) -> None:
    """Train a byte-pair encoding on texts and write it atomically to `model_path`.

    Unknown characters fall back to bytes, digits are single tokens, spaces and newlines are
    preserved; ids as in Llama: unk 0, bos 1, eos 2. Equal texts produce equal files.
    """
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


def _size_of(tokenizer: Any) -> int:
    """Return the largest id plus one; ids added later may leave gaps."""
    return int(max(tokenizer.get_vocab().values(), default=-1)) + 1


def _import(library: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ResourceError(
            f"this tokenizer requires the {library} library: pip install megagrow[hf]"
        ) from error


def _copy(source: Path, target: Path) -> Path:
    with atomic_file(target) as partial:
        shutil.copyfile(source, partial)
    return target


def _digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def _no_eos(name: str | Path) -> InputError:
    return DataError(f"{name}: the tokenizer has no EOS token to end documents with; add one")
