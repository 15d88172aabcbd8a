"""Hugging Face tokenizers: tokenizer.json, those of transformers (extra `hf`), and their files.

The files next to a tokenizer declare its EOS token, also that of a SentencePiece model.
"""

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from megagrow.common.atomic_files import atomic_file, write_text
from megagrow.common.json_text import read_json
from megagrow.errors import DataError, InputError, ResourceError

MOST_IDS = 2**24
"""Maximum vocabulary size."""

TOKENIZER_BYTES = 200_000_000
"""Maximum size of a file of a tokenizer."""

TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Files with the text of the EOS token, `eos_token`, in the order in which they are read."""

ID_FILES = ("generation_config.json", "config.json")
"""Files with its id, `eos_token_id`, read if no file of TOKEN_FILES has it."""

EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
"""EOS token names tried if no file declares one."""


@dataclass(frozen=True)
class DeclaredEos:
    """Id of an EOS token and the files from which the same lookup finds it again."""

    token_id: int
    files: tuple[Path, ...]


class JsonTokenizer:
    """Hugging Face tokenizer.json; files next to it name the EOS token."""

    def __init__(self, path: Path) -> None:
        library = _import("tokenizers")
        with _library_errors(f"{path}: not a tokenizer.json"):
            self._tokenizer = library.Tokenizer.from_file(str(path))
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
        # It fails for example if the vocabulary lacks its unknown token.
        with _library_errors(f"{self._path}: cannot encode a text"):
            return [encode([text])[0].ids for text in texts]

    def normalize(self, text: str) -> str:
        return _normalized(self._tokenizer, text)

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
        with _library_errors(f"{name}: no tokenizer found"):
            # Never run code shipped with a tokenizer.
            self._tokenizer = library.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
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

    def normalize(self, text: str) -> str:
        is_fast = self._tokenizer.is_fast
        return _normalized(self._tokenizer.backend_tokenizer, text) if is_fast else text

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


def find_eos(
    tokenizer: Path, id_of: Callable[[str], int | None], vocab_size: int
) -> DeclaredEos | None:
    """Look up the EOS token of a tokenizer file in the files next to it, then by EOS_NAMES.

    `id_of` returns the id of a token, None if there is none. Of a list of ids, the first is used.
    Raises DataError if a file declares a token that the tokenizer does not have.
    """
    read: list[Path] = []
    for name in (*TOKEN_FILES, *ID_FILES):
        path = tokenizer.with_name(name)
        if not path.is_file():
            continue
        read.append(path)
        content = read_json(path)
        declared = _token(path, content) if name in TOKEN_FILES else _id(path, content)
        token_id = id_of(declared) if isinstance(declared, str) else declared
        if declared is not None and (token_id is None or not 0 <= token_id < vocab_size):
            raise DataError(
                f"{path}: its EOS token {declared!r} is not a token of {tokenizer}; correct it"
            )
        if token_id is not None:
            return DeclaredEos(token_id, tuple(read))
    known = (id_of(name) for name in EOS_NAMES)
    token_id = next((number for number in known if number is not None), None)
    files = tuple(path for path in read if path.name in TOKEN_FILES)
    return None if token_id is None else DeclaredEos(token_id, files)


def no_eos(name: str | Path) -> InputError:
    """Return the error for a tokenizer without an EOS token."""
    return DataError(
        f"{name}: the tokenizer has no EOS token to end documents with; name one as 'eos_token' "
        f"in a {TOKEN_FILES[0]} next to it"
    )


def copy_file(source: Path, target: Path) -> Path:
    """Copy a file atomically and return the copy."""
    with atomic_file(target) as partial:
        shutil.copyfile(source, partial)
    return target


def checksum_of(*parts: bytes) -> str:
    """Return a hexadecimal digest of the contents that identify a tokenizer."""
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


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


def _normalized(tokenizer: Any, text: str) -> str:
    normalizer = tokenizer.normalizer
    return text if normalizer is None else str(normalizer.normalize_str(text))


@contextmanager
def _library_errors(problem: str) -> Iterator[None]:
    """Convert exceptions of the libraries to DataError: damaged files raise arbitrary ones, also
    panics of Rust code, which are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise DataError(f"{problem}: {reason}") from error


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


def _token(path: Path, content: dict[str, Any]) -> str | None:
    token = content.get("eos_token") or None
    name = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(name, str):
        raise DataError(f"{path}: 'eos_token' must be the text of a token")
    return name


def _id(path: Path, content: dict[str, Any]) -> int | None:
    number = content.get("eos_token_id")
    if isinstance(number, list):
        number = number[0] if number else None
    if isinstance(number, bool) or not isinstance(number, int | None):
        raise DataError(f"{path}: 'eos_token_id' must be the id of a token or a list of ids")
    return number
