"""The tokenizer's files of a Hugging Face folder, from the tokenizer that a model was trained with.

A SentencePiece model becomes a LlamaTokenizer, which gives the same ids; a tokenizer of Hugging
Face is copied file by file. Only files of known names are taken, and no code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece

from megagrow.checkpoint.hugging_face_config import read_json, without_code
from megagrow.data.tokenizers import JsonTokenizer, SentencePieceTokenizer, Tokenizer
from megagrow.errors import InputError

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
_TABLES = (
    *(JSON_FILE, SENTENCEPIECE_FILE, "vocab.json", "merges.txt", "vocab.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Files of tokenizers that hold data and nothing else."""

_ANY_CLASS = "PreTrainedTokenizerFast"
"""transformers' class for whatever a tokenizer.json says."""

_SPACE = "\u2581"
"""How SentencePiece writes a space."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What a tokenizer adds to a folder, and the ids of its special tokens where they are known."""

    documents: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    copies: Mapping[str, Path] = field(default_factory=dict)
    ids: Mapping[str, int | None] = field(default_factory=dict)
    """bos_token_id and eos_token_id."""


def is_tokenizer(path: Path) -> bool:
    """Whether a path looks like something that `tokenizer_files` reads."""
    if path.is_dir():
        return any((path / name).is_file() for name in _TABLES[:3])
    return path.is_file()


def tokenizer_files(path: Path, vocab_size: int) -> TokenizerFiles:
    """The files of a tokenizer: a SentencePiece .model, a tokenizer.json, or a folder.

    Errors: InputError if there is none, if it can not be written so that the ids stay the same, or
    if a model of this vocabulary can not embed all its tokens.
    """
    if not is_tokenizer(path):
        raise InputError(
            f"{path}: no tokenizer; should be a SentencePiece .model, a tokenizer.json, or a "
            "folder of Hugging Face that holds one"
        )
    if path.is_file() and path.suffix == ".model":
        return _of_sentencepiece(path, vocab_size)
    return _of_folder(path if path.is_dir() else path.parent, vocab_size)


def _of_sentencepiece(path: Path, vocab_size: int) -> TokenizerFiles:
    own = SentencePieceTokenizer(path)
    _check_size(path, own, vocab_size)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    _check_llama(path, model)
    ids = {"bos_token_id": _id(model.bos_id()), "eos_token_id": own.eos_id}
    special = {"unk_token": _id(model.unk_id()), "bos_token": _id(model.bos_id())}
    special |= {"eos_token": own.eos_id, "pad_token": _id(model.pad_id())}
    names = {
        key: None if number is None else model.id_to_piece(number)
        for key, number in special.items()
    }
    added = {
        str(number): _added(model.id_to_piece(number))
        for number in sorted(number for number in special.values() if number is not None)
    }
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": model.encode("a", out_type=str)[0].startswith(_SPACE),
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": added,
        **names,
    }
    return TokenizerFiles({SETTINGS_FILE: settings}, {SENTENCEPIECE_FILE: path}, ids)


def _added(piece: str) -> dict[str, Any]:
    sides = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": piece, "special": True, **sides}


def _check_llama(path: Path, model: Any) -> None:
    """InputError if a LlamaTokenizer, which is a byte-pair encoding without normalisation, would
    give other ids. The file does not say so itself; its behaviour does."""
    scores = [model.get_score(number) for number in range(model.vocab_size())]
    pairs = all(score == int(score) for score in scores)
    if not pairs:
        problem = "is no byte-pair encoding"
    elif model.decode(model.encode("a  b ")) != "a  b ":
        problem = "drops spaces"
    elif "fi" in model.decode(model.encode("\ufb01")):  # the ligature, in most normal forms
        problem = "normalises text"
    else:
        return
    raise InputError(
        f"{path}: {problem}, so that transformers' LlamaTokenizer would give other ids: convert it "
        "to a tokenizer.json and name its folder"
    )


def _of_folder(folder: Path, vocab_size: int) -> TokenizerFiles:
    copies = {name: folder / name for name in _TABLES if (folder / name).is_file()}
    settings = folder / SETTINGS_FILE
    if SENTENCEPIECE_FILE in copies and JSON_FILE not in copies and not settings.is_file():
        return _of_sentencepiece(copies[SENTENCEPIECE_FILE], vocab_size)
    documents = {SETTINGS_FILE: without_code(read_json(settings))} if settings.is_file() else {}
    own: Tokenizer | None = None
    if JSON_FILE in copies:
        own = JsonTokenizer(copies[JSON_FILE])
        # Without its class a tokenizer beside a Llama model is taken for Llama's own.
        plain = {"tokenizer_class": _ANY_CLASS, "eos_token": own.decode([own.eos_id])}
        documents.setdefault(SETTINGS_FILE, plain)
    elif SENTENCEPIECE_FILE in copies:
        own = SentencePieceTokenizer(copies[SENTENCEPIECE_FILE])
    if own is None:
        return TokenizerFiles(documents, copies)
    _check_size(folder, own, vocab_size)
    return TokenizerFiles(documents, copies, {"eos_token_id": own.eos_id})


def _check_size(path: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model embeds "
            f"{vocab_size}; give the one that it was trained with"
        )


def _id(number: int) -> int | None:
    """SentencePiece says -1 for a token that it does not have."""
    return number if number >= 0 else None
