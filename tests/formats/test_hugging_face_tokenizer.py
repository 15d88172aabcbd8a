"""The tokenizer of an exported folder gives the ids with which the model was trained."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.data.tokenizers import load_tokenizer
from megagrow.errors import InputError
from megagrow.formats.hugging_face_tokenizer import tokenizer_files
from tests.helpers.hugging_face import hugging_face, tiny

TEXT = "def grow(model):\n    return model  # twice as deep, 4 times as wide\n" * 30
TEXTS = [
    "def grow(model):\n\n    return model\n",
    "  two spaces  and 1234 digits  ",
    "\ttabs, caf\u00e9, \u4f60\u597d, \ufb01 and \U0001f600",
    " a",
    "",
]


def write(path: Path, folder: Path, vocab_size: int = 400) -> dict[str, Any]:
    """The files of a tokenizer, put into a folder beside a model; returns the ids."""
    files = tokenizer_files(path, vocab_size)
    hugging_face(tiny()).save_pretrained(folder)
    for name, origin in files.copies.items():
        shutil.copyfile(origin, folder / name)
    for name, document in files.documents.items():
        (folder / name).write_text(json.dumps(document))
    return dict(files.ids)


def trained(path: Path, **changes: Any) -> Path:
    """A SentencePiece model like Llama's own, or unlike it by some of its settings."""
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": 290,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, **options | changes
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture
def own(tmp_path) -> Path:
    train_sentencepiece([TEXT], 300, tmp_path / "own.model")
    return tmp_path / "own.model"


def same_ids(folder: Path, ours: Path) -> Any:
    theirs, tokenizer = AutoTokenizer.from_pretrained(folder), load_tokenizer(ours)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids)
    return theirs


def test_our_sentencepiece_gives_the_same_ids_in_transformers(own, tmp_path):
    ids = write(own, tmp_path / "out")
    theirs = same_ids(tmp_path / "out", own)
    assert ids == {"bos_token_id": 1, "eos_token_id": 2}
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs.pad_token_id is None
    assert theirs.encode("a</s>")[-1] == 2
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == own.read_bytes()


def test_one_with_a_space_in_front_and_another_eos(tmp_path):
    path = trained(tmp_path / "llama.model", unk_id=3, bos_id=-1, eos_id=0, pad_id=1)
    ids = write(path, tmp_path / "out")
    theirs = same_ids(tmp_path / "out", path)
    assert ids == {"bos_token_id": None, "eos_token_id": 0}
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (0, 1, 3)
    assert theirs.bos_token_id is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "unigram", "vocab_size": 290}, ""),
        ({"remove_extra_whitespaces": True}, "'a  b '"),
        ({"normalization_rule_name": "nmt_nfkc"}, ""),
        ({"user_defined_symbols": ["<<>>"]}, ""),
    ],
)
def test_a_sentencepiece_that_can_not_be_rebuilt_is_refused(tmp_path, changes, text):
    path = trained(tmp_path / "x.model", **changes)
    with pytest.raises(InputError, match=r"x.model: not a plain byte-pair encoding") as error:
        tokenizer_files(path, 400)
    assert f"different ids for {text}" in str(error.value)


def byte_level(folder: Path) -> Path:
    """A tokenizer.json of another kind than Llama's, without any settings beside it."""
    folder.mkdir()
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_of_theirs_is_copied(tmp_path):
    folder = byte_level(tmp_path / "theirs")
    assert write(folder, tmp_path / "out") == {"eos_token_id": 256}
    theirs = same_ids(tmp_path / "out", folder / "tokenizer.json")
    assert theirs.eos_token_id == 256
    assert write(folder / "tokenizer.json", tmp_path / "again") == {"eos_token_id": 256}


def test_only_known_files_are_copied_and_no_code(tmp_path):
    folder = byte_level(tmp_path / "theirs")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("tokenization_evil.py", "model.safetensors", "chat_template.jinja"):
        (folder / name).write_text("x")
    files = tokenizer_files(folder, 400)
    assert set(files.copies) == {"tokenizer.json", "chat_template.jinja"}
    assert files.documents["tokenizer_config.json"].keys() == {"tokenizer_class", "eos_token"}


def test_a_folder_with_a_sentencepiece_model_alone_is_that_model(own, tmp_path):
    (tmp_path / "corpus").mkdir()
    shutil.copyfile(own, tmp_path / "corpus" / "tokenizer.model")
    write(tmp_path / "corpus", tmp_path / "out")
    same_ids(tmp_path / "out", own)


def test_what_is_no_tokenizer_is_named(own, tmp_path):
    with pytest.raises(InputError, match=r"none.model: no tokenizer; pass a"):
        tokenizer_files(tmp_path / "none.model", 400)
    with pytest.raises(InputError, match=r": no tokenizer; pass a"):
        tokenizer_files(tmp_path, 400)
    with pytest.raises(InputError, match=r"has 300 tokens, the model has vocab_size 299"):
        tokenizer_files(own, 299)
