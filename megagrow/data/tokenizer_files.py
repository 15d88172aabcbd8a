"""Files of a tokenizer: the EOS token that they declare, copies and checksums."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagrow.common.atomic_files import atomic_file
from megagrow.common.json_text import read_json
from megagrow.errors import DataError, InputError

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
