"""Tokenizers: SentencePiece models and Hugging Face tokenizers (extra `hf`).

No tokenizer adds special tokens or parses them from text: "</s>" in a document does not end it.
"""

import hashlib
import json
import re
import string
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from megagrow.data.hugging_face_tokenizers import (
    TOKENIZER_BYTES,
    JsonTokenizer,
    TransformersTokenizer,
)
from megagrow.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megagrow.data.workers import run_limited
from megagrow.errors import DataError

TRIAL_BYTES, TRIAL_SECONDS = 4 * 2**30, 120
"""Memory and CPU time of the trial of a tokenizer; large ones take 1 GB and 10 s."""

MOST_EXPANSION = 100
"""Maximum characters or tokens per character of a text. Unicode normalization makes 18."""

FOLDER_FILES = ("tokenizer.json", "tokenizer.model")
TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
"""Endings of the files that a tokenizer is loaded from."""

_IDS = 1000
"""Ids or strings tried at a time."""

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

    def normalize(self, text: str) -> str:
        """Return the text that is split into tokens."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""

    def save(self, folder: Path) -> list[Path]:
        """Write the files needed to load the tokenizer and return them, the main file first."""


def load_tokenizer(name: str | Path, is_tried: bool = False) -> Tokenizer:
    """Load a SentencePiece .model, a tokenizer.json, or a folder or name known to transformers.

    A tokenizer is first loaded and tried in a process with limited memory and time, because the
    libraries have no limits, unless another process of the same command has done so (`is_tried`).
    Raises DataError if it is missing, invalid, beyond a limit, or has no EOS token.
    """
    path = Path(name)
    is_file = path.suffix in (".model", ".json")
    if is_file and not path.is_file():
        raise DataError(f"{path}: no such tokenizer file")
    if not is_tried and (problem := _problem_of(_trial_of(str(name)))):
        raise DataError(f"{name}: the tokenizer {problem}; it is damaged or malicious")
    if not is_file:
        return TransformersTokenizer(str(name))
    return SentencePieceTokenizer(path) if path.suffix == ".model" else JsonTokenizer(path)


@dataclass(frozen=True)
class _Trial:
    """Tokenizer to be tried; equal contents are tried once per process."""

    name: str = field(compare=False)
    files: tuple[tuple[str, str], ...]
    """Names and digests of the files; empty for a name on the Hub."""


def _trial_of(name: str) -> _Trial:
    """Read the files of a tokenizer. Raises DataError for one larger than any tokenizer's."""
    path = Path(name)
    found = [path] if path.is_file() else path.glob("*") if path.is_dir() else []
    files = sorted(file for file in found if file.suffix in TOKENIZER_SUFFIXES and file.is_file())
    digests = []
    for file in files:
        if file.stat().st_size > TOKENIZER_BYTES:
            raise DataError(f"{file}: larger than the limit of {TOKENIZER_BYTES} bytes")
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "blake2b").hexdigest()
        digests.append((path.suffix if file == path else file.name, digest))
    return _Trial(name, tuple(digests) or ((name, ""),))


@lru_cache(maxsize=64)
def _problem_of(trial: _Trial) -> str:
    """Return the problem that `try_tokenizer` finds in a limited process.

    Of a folder, the file that transformers reads is tried, without importing transformers. Raises
    InputError if the tokenizer cannot be loaded.
    """
    name, files = trial.name, [file for file, _ in trial.files if file in FOLDER_FILES]
    if not files:
        return run_limited(try_tokenizer, name, TRIAL_BYTES, TRIAL_SECONDS)
    with suppress(DataError):  # transformers may accept it, for example with another EOS token
        return run_limited(try_tokenizer, str(Path(name, files[0])), TRIAL_BYTES, TRIAL_SECONDS)
    return ""


def try_tokenizer(name: str) -> str:
    """Load a tokenizer, encode probes and decode its vocabulary; return a problem or "".

    The probes contain all strings that the file's normalizer replaces, and long runs of one
    character, for which the time of some models is quadratic.
    """
    tokenizer = load_tokenizer(name, is_tried=True)
    probes = (PROBE, string.printable, "a" * 10_000, " " * 10_000, *_patterns(Path(name)))
    for text in probes:
        with suppress(DataError):  # of a text that it cannot encode
            count = max(len(tokenizer.normalize(text)), *map(len, tokenizer.encode_batch([text])))
            if count > MOST_EXPANSION * (len(text) + 10):
                return f"expands a text of {len(text)} characters to {count} characters or tokens"
    for first in range(0, tokenizer.vocab_size, _IDS):
        tokenizer.decode([*range(first, min(first + _IDS, tokenizer.vocab_size))])
    return ""


_STRINGS = re.compile(rb'"(?:String|prepend|content)"\s*:\s*("(?:[^"\\]|\\.){1,99}")')
"""Values of these keys in a tokenizer.json."""


def _patterns(path: Path) -> Iterator[str]:
    """Yield the strings that a tokenizer.json replaces, splits at or adds as tokens, joined."""
    if path.suffix == ".json":
        strings = [json.loads(text) for text in _STRINGS.findall(path.read_bytes())]
        for first in range(0, len(strings), _IDS):
            yield " ".join(strings[first : first + _IDS])


def tokenizers_at(path: Path) -> Iterator[Tokenizer]:
    """Yield the tokenizers that a path contains: a file's, or those of the files of a folder.

    The same tokenizer in two formats has two checksums. Raises DataError if it is invalid.
    """
    if path.is_dir():
        files = (path / name for name in FOLDER_FILES)
        yield from (load_tokenizer(file) for file in files if file.is_file())
    yield load_tokenizer(path)


def gives_same_ids(first: Tokenizer, second: Tokenizer) -> bool:
    """Return True if two tokenizers are equal, or encode a probe and a vocabulary equally.

    The same tokenizer in another format, or saved by another version of its library, has another
    checksum.
    """
    if first.checksum == second.checksum:
        return True
    if (first.vocab_size, first.eos_id) != (second.vocab_size, second.eos_id):
        return False
    starts = range(0, first.vocab_size, _IDS)
    pieces = (first.decode([*range(at, min(at + _IDS, first.vocab_size))]) for at in starts)
    return all(
        first.encode_batch([text]) == second.encode_batch([text]) for text in (PROBE, *pieces)
    )


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
