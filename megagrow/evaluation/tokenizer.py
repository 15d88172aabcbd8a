"""Tokenizers used as by lm-eval's Hugging Face model, so that both score the same tokens.

In training, text that looks like a special token is encoded as text. Here it is encoded as the
special token, and the special token that some tokenizers put at the start of a text is kept:
published results are measured this way.
"""

import json
import shutil
from array import array
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from megagrow.data.hugging_face_tokenizers import encode_completely
from megagrow.data.tokenizers import check_tokenizer, load_tokenizer
from megagrow.formats.hugging_face_tokenizer import TokenizerFiles, tokenizer_files


class EvalTokenizer:
    """Encoder and decoder of token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        bos: int | None = tokenizer.bos_token_id
        self.prefix_id = self.eos_id if bos is None else bos
        """Token in front of a text without context."""
        self._prefix = tokenizer.decode([self.prefix_id])

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Return the token ids of a text.

        `special` controls whether the tokenizer adds special tokens; None selects its default, but
        never adds a second prefix token.
        """
        if special is None and text.startswith(self._prefix):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(text, verbose=False, **options))

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Return the text; `special` includes special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=not special))


class CachedTokenizer(EvalTokenizer):
    """Tokenizer that caches every text's token ids, for tasks that are evaluated repeatedly."""

    def __init__(self, base: EvalTokenizer) -> None:
        super().__init__(base.tokenizer)
        self._cache: dict[tuple[str, bool | None], array[int]] = {}

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        key = (text, special)
        if key not in self._cache:
            self._cache[key] = array("i", super().encode(text, special))
        return self._cache[key].tolist()


def open_tokenizer(name: str, vocab_size: int) -> EvalTokenizer:
    """Open a SentencePiece .model, a tokenizer.json, or a folder or name known to transformers.

    Raises InputError if the tokenizer does not exist, has no end-of-document token, or has more
    tokens than `vocab_size`.
    """
    check_tokenizer(name, vocab_size)
    if not Path(name).is_file():
        return _opened(name, name)
    with TemporaryDirectory() as folder:
        _write(tokenizer_files(Path(name), vocab_size), Path(folder))
        return _opened(folder, name)


def _opened(folder: str, name: str) -> EvalTokenizer:
    """Open a folder with the EOS token of the tokenizer `name`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.is_fast:
        encode_completely(tokenizer.backend_tokenizer)
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(load_tokenizer(name).eos_id)
    return EvalTokenizer(tokenizer)


def _write(files: TokenizerFiles, folder: Path) -> None:
    for name, document in files.documents.items():
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    for name, path in files.copies.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
