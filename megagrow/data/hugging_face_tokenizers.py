"""Hugging Face tokenizers: tokenizer.json, and the tokenizers of transformers (extra `hf`)."""

import importlib
import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from megagrow.common.atomic_files import write_text
from megagrow.data.tokenizer_files import (
    TOKEN_FILES,
    DeclaredEos,
    checksum_of,
    copy_file,
    find_eos,
    no_eos,
)
from megagrow.errors import DataError, ResourceError

MOST_IDS = 2**24
"""Maximum vocabulary size."""


class JsonTokenizer:
    """Hugging Face tokenizer.json; files next to it name the EOS token."""

    def __init__(self, path: Path) -> None:
        library = _import("tokenizers")
        try:
            self._tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path}: not a tokenizer.json: {error}") from error
        self._is_changed = encode_completely(self._tokenizer)
        self.supports_windows = _supports_windows(self._tokenizer)
        self._tokenizer.encode_special_tokens = True
        self._path = path
        self.vocab_size = _size_of(self._tokenizer)
        if self.vocab_size > MOST_IDS:  # the library would allocate memory for all ids and abort
            raise DataError(f"{path}: a token has the id {self.vocab_size - 1}; damaged")
        eos = find_eos(path, self._tokenizer.token_to_id, self.vocab_size)
        if eos is None:
            raise no_eos(path)
        self.eos_id = eos.token_id
        self._eos_files = eos.files
        self.checksum = checksum_of(self._tokenizer.to_str().encode(), str(self.eos_id).encode())

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
        target = folder / "tokenizer.json"
        if self._is_changed:
            write_text(target, self._tokenizer.to_str(pretty=True))
        else:
            copy_file(self._path, target)
        settings = self._path.with_name(TOKEN_FILES[0])
        others = {settings, *self._eos_files} if settings.is_file() else self._eos_files
        return [target, *(copy_file(path, folder / path.name) for path in sorted(others))]


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
        self.supports_windows = False
        if self._tokenizer.is_fast:
            encode_completely(self._tokenizer.backend_tokenizer)
            self.supports_windows = _supports_windows(self._tokenizer.backend_tokenizer)
        self.vocab_size = _size_of(self._tokenizer)
        if self._tokenizer.eos_token_id is None:
            eos = self._declared_eos(Path(name))
            if eos is None:
                raise no_eos(name)
            self._tokenizer.eos_token = self._tokenizer.convert_ids_to_tokens(eos.token_id)
        self.eos_id = self._tokenizer.eos_token_id
        self.checksum = checksum_of(self._description().encode(), str(self.eos_id).encode())

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

    def _declared_eos(self, folder: Path) -> DeclaredEos | None:
        vocabulary = self._tokenizer.get_vocab()
        return find_eos(folder / "tokenizer", vocabulary.get, self.vocab_size)

    def _description(self) -> str:
        if self._tokenizer.is_fast:
            return str(self._tokenizer.backend_tokenizer.to_str())
        return json.dumps(self._tokenizer.get_vocab(), sort_keys=True)


def encode_completely(tokenizer: Any) -> bool:
    """Disable truncation, padding and the random dropout of merges that a tokenizer.json enables.

    `tokenizer` is a `tokenizers.Tokenizer`. Returns True if one of them was enabled.
    """
    dropout = getattr(tokenizer.model, "dropout", None)
    is_changed = bool(tokenizer.truncation or tokenizer.padding or dropout)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if dropout:
        tokenizer.model.dropout = None
    return is_changed


def _supports_windows(tokenizer: Any) -> bool:
    return type(tokenizer.model).__name__ != "Unigram"


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
