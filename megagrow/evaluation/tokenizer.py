"""Tokenizers as lm-eval's own Hugging Face model uses them, so that both score the same tokens.

In training a text that looks like a special token is a text; here it is that token, and a tokenizer
that begins texts with one does so: what is published was measured in that way.
"""

import json
import shutil
from array import array
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from megagrow.data.tokenizers import check_tokenizer
from megagrow.formats.hugging_face_tokenizer import TokenizerFiles, tokenizer_files


class Texts:
    """Text to token ids and back."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        bos: int | None = tokenizer.bos_token_id
        self.prefix_id = self.eos_id if bos is None else bos
        """What stands before a text that has no context."""
        self._prefix = tokenizer.decode([self.prefix_id])

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Token ids; `special` says whether the tokenizer may add its own, None what it does by
        itself (but never a second one)."""
        if special is None and text.startswith(self._prefix):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(text, verbose=False, **options))

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class RememberedTexts(Texts):
    """The same, for texts that come again and again: each becomes tokens once."""

    def __init__(self, texts: Texts) -> None:
        super().__init__(texts.tokenizer)
        self._known: dict[tuple[str, bool | None], array[int]] = {}

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        key = (text, special)
        if key not in self._known:
            self._known[key] = array("i", super().encode(text, special))
        return self._known[key].tolist()


def open_texts(name: str, vocab_size: int) -> Texts:
    """A SentencePiece .model, a tokenizer.json, or a folder or name that transformers knows.

    Errors: InputError if there is none, if it has no end-of-document token, or more tokens than the
    model embeds.
    """
    check_tokenizer(name, vocab_size)
    if not Path(name).is_file():
        return Texts(AutoTokenizer.from_pretrained(name, trust_remote_code=False))
    with TemporaryDirectory() as folder:
        _write(tokenizer_files(Path(name), vocab_size), Path(folder))
        return Texts(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def _write(files: TokenizerFiles, folder: Path) -> None:
    for name, document in files.documents.items():
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    for name, path in files.copies.items():
        shutil.copyfile(path, folder / name)
