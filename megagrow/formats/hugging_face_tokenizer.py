"""Tokenizer files of an exported Hugging Face folder.

A SentencePiece model is converted to a tokenizer.json with identical ids (transformers'
LlamaTokenizer gives different ids for a text that starts with a space); a Hugging Face tokenizer is
copied file by file. Only files with known names are copied, never code.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from megagrow.common.json_text import read_json
from megagrow.data.tokenizers import Tokenizer, load_tokenizer
from megagrow.errors import DataError
from megagrow.formats.hugging_face_config import code_warnings, without_code
from megagrow.formats.hugging_face_origin import (
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_FOLDER,
    TOKENIZER_SETTINGS_FILE,
)

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
_TABLES = (
    *(JSON_FILE, SENTENCEPIECE_FILE, "vocab.json", "merges.txt", "vocab.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
    *(CHAT_TEMPLATE_FILE, "chat_template.json"),
)
"""Tokenizer files that contain only data."""

_ANY_CLASS = "PreTrainedTokenizerFast"
"""transformers' class for any tokenizer.json."""

_SPACE = "\u2581"
"""SentencePiece's symbol for a space."""

_PIECES = 500
"""Vocabulary pieces decoded at a time to compare two tokenizers."""

_PROBES = ("a  b ", " a", "  a\n\n b", "\t", "\ufb01\uff21e\u0301", "\U0001f600", "")
"""Test texts: spaces in all positions, characters changed by Unicode normalization, and characters
outside of vocabularies."""


@dataclass(frozen=True)
class TokenizerFiles:
    """Files that a tokenizer adds to a folder, and the known ids of its special tokens."""

    documents: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)
    ids: Mapping[str, int | None] = field(default_factory=dict)
    """Keys bos_token_id and eos_token_id."""
    warnings: tuple[str, ...] = ()
    """One line for each content that is left out."""

    @property
    def has_chat_template(self) -> bool:
        """Return True if the files contain a chat template."""
        folder = f"{CHAT_TEMPLATE_FOLDER}/"
        files = any(name == CHAT_TEMPLATE_FILE or name.startswith(folder) for name in self.copies)
        return files or bool(self.documents.get(TOKENIZER_SETTINGS_FILE, {}).get("chat_template"))


def is_tokenizer(path: Path) -> bool:
    """Return True if `tokenizer_files` can read the path."""
    if path.is_dir():
        return any((path / name).is_file() for name in _TABLES[:3])
    return path.is_file()


def tokenizer_files(path: Path, vocab_size: int) -> TokenizerFiles:
    """Return the files of a tokenizer: a SentencePiece .model, a tokenizer.json, or a folder.

    Raises DataError if there is none, if it cannot be converted with identical ids, or if it has
    more than `vocab_size` tokens.
    """
    if not is_tokenizer(path):
        raise DataError(
            f"{path}: no tokenizer; pass a SentencePiece .model, a tokenizer.json, or a Hugging "
            "Face folder that contains one"
        )
    if path.is_file() and path.suffix == ".model":
        return _of_sentencepiece(path, vocab_size)
    return _of_folder(path if path.is_dir() else path.parent, vocab_size)


def _of_sentencepiece(path: Path, vocab_size: int) -> TokenizerFiles:
    own = load_tokenizer(path)
    _check_size(path, own, vocab_size)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    special = {name: _id(getattr(model, f"{name}_id")()) for name in ("unk", "bos", "eos", "pad")}
    converted = _rebuilt(model, special)
    _check_same_ids(path, model, converted)
    settings = {
        "tokenizer_class": _ANY_CLASS,
        "clean_up_tokenization_spaces": False,
        **{
            f"{name}_token": None if number is None else model.id_to_piece(number)
            for name, number in special.items()
        },
    }
    documents = {JSON_FILE: json.loads(converted.to_str()), TOKENIZER_SETTINGS_FILE: settings}
    ids = {"bos_token_id": special["bos"], "eos_token_id": own.eos_id}
    return TokenizerFiles(documents, {SENTENCEPIECE_FILE: path}, ids)


def _rebuilt(model: Any, special: Mapping[str, int | None]) -> Any:
    """Convert a SentencePiece byte-pair encoding to the tokenizers library."""
    pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
    prefix = model.encode("a", out_type=str)[0].startswith(_SPACE)
    bytes_too = any(model.is_byte(number) for number in range(len(pieces)))
    converted = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=_merges(model, pieces),
            unk_token=pieces[model.unk_id()],
            fuse_unk=True,
            byte_fallback=bytes_too,
        )
    )
    space = normalizers.Replace(" ", _SPACE)
    first = normalizers.Prepend(_SPACE)
    converted.normalizer = normalizers.Sequence([first, space] if prefix else [space])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    converted.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    added = sorted({number for number in special.values() if number is not None})
    converted.add_special_tokens(
        [tokenizers.AddedToken(pieces[number], normalized=False) for number in added]
    )
    return converted


def _merges(model: Any, pieces: list[str]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that form a piece, in the order of the formed pieces' scores."""
    ranks = {
        piece: (-model.get_score(number), number)
        for number, piece in enumerate(pieces)
        if not any(
            is_other(number)
            for is_other in (model.is_control, model.is_unknown, model.is_byte, model.is_unused)
        )
    }
    pairs = [
        (*rank, piece[:cut], piece[cut:])
        for piece, rank in ranks.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ranks and piece[cut:] in ranks
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _check_same_ids(path: Path, model: Any, converted: Any) -> None:
    """Raise DataError if the converted tokenizer gives different ids.

    A SentencePiece model may do more than merge pairs, which its file does not expose.
    """
    ids, converted.encode_special_tokens = range(model.vocab_size()), True
    vocabulary_texts = [model.decode(list(ids[i : i + _PIECES])) for i in ids[::_PIECES]]
    for text in (*_PROBES, *vocabulary_texts):
        if converted.encode(text, add_special_tokens=False).ids != model.encode(text):
            raise DataError(
                f"{path}: not a plain byte-pair encoding, transformers would give different ids "
                f"for {text[:20]!r}; convert it to a tokenizer.json and pass its folder"
            )
    converted.encode_special_tokens = False


def _of_folder(folder: Path, vocab_size: int) -> TokenizerFiles:
    copies = {name: folder / name for name in _TABLES if (folder / name).is_file()}
    path = folder / TOKENIZER_SETTINGS_FILE
    if SENTENCEPIECE_FILE in copies and JSON_FILE not in copies and not path.is_file():
        return _of_sentencepiece(copies[SENTENCEPIECE_FILE], vocab_size)
    templates = sorted((folder / CHAT_TEMPLATE_FOLDER).glob("*.jinja"))
    copies |= {f"{CHAT_TEMPLATE_FOLDER}/{file.name}": file for file in templates}
    settings = read_json(path) if path.is_file() else None
    warnings = code_warnings(settings or {}, str(path))
    own: Tokenizer | None = None
    if JSON_FILE in copies:
        own = load_tokenizer(copies[JSON_FILE])
    elif SENTENCEPIECE_FILE in copies:
        own = load_tokenizer(copies[SENTENCEPIECE_FILE])
    documents = {}
    if settings is not None:
        documents[TOKENIZER_SETTINGS_FILE] = without_code(settings)
    elif JSON_FILE in copies and own is not None:
        # Without a class, transformers uses that of the model's family, such as LlamaTokenizer.
        plain = {"tokenizer_class": _ANY_CLASS, "eos_token": own.decode([own.eos_id])}
        documents[TOKENIZER_SETTINGS_FILE] = plain
    ids = {}
    if own is not None:
        _check_size(folder, own, vocab_size)
        ids["eos_token_id"] = own.eos_id
    return TokenizerFiles(documents, copies, ids, tuple(warnings))


def _check_size(path: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model has vocab_size "
            f"{vocab_size}; pass the tokenizer that it was trained with"
        )


def _id(number: int) -> int | None:
    """Convert SentencePiece's -1 for an absent token to None."""
    return number if number >= 0 else None
