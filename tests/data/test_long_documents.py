"""Long documents in windows: the tokens of the complete document, whatever the tokenizer."""

import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from megagrow.data import document_encoding
from megagrow.data.document_encoding import encode_document
from megagrow.data.tokenizers import load_tokenizer

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))"
"""Groups of three digits counted from the end of a number, which a window may cut."""

HARD = (
    "0000111 aaaaaa   \n\n\t\r\n \u4f60\u597d \U0001f680\U0001f680e\u0301 x=1;-----'s don't " * 30
)


def _byte_level(**options: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


PRE_TOKENIZERS = {
    "byte level": _byte_level(),
    "prefix space": _byte_level(add_prefix_space=True),
    "groups of digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GPT4), "isolated"), _byte_level(use_regex=False)]
    ),
    "groups from the right": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(FROM_THE_RIGHT), "isolated"), _byte_level()]
    ),
    "metaspace": pre_tokenizers.Metaspace(),
    "one word": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    "added tokens": _byte_level(),
    "normalized": _byte_level(),
}


def _train(kind: str, texts: list[str], folder: Path) -> Path:
    """Train a byte-pair encoding of the tokenizers library and return its file."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[kind]
    if kind == "normalized":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.NFKC()])
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*texts[:3], HARD], trainer)
    if kind == "added tokens":
        runs = [tokenizers.AddedToken(" " * n, normalized=False) for n in range(2, 12)]
        around = tokenizers.AddedToken("def", lstrip=True, rstrip=True)
        tokenizer.add_tokens([*runs, around])
    path = folder / f"{kind.replace(' ', '_')}.json"
    tokenizer.save(str(path))
    return path


def _train_sentencepiece(kind: str, texts: list[str], folder: Path) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts[:4]).split("\n")),
        model_prefix=str(folder / kind),
        model_type=kind,
        vocab_size=600,
        byte_fallback=True,
        minloglevel=2,
    )
    return folder / f"{kind}.model"


@pytest.fixture(scope="module", params=[*PRE_TOKENIZERS, "bpe", "unigram"])
def tokenizer(request, sample_texts, tmp_path_factory):
    train = _train_sentencepiece if request.param in ("bpe", "unigram") else _train
    return load_tokenizer(train(request.param, sample_texts, tmp_path_factory.mktemp("long")))


def _piece(random_: random.Random, text: str) -> str:
    length = random_.choice([5, 50, 500, 3000])
    start = random_.randrange(len(text) - 3000)
    alphabet = random_.choice(["0123456789", "\u4f60\u597d\u4e16\u754c", "abcdef", " \n\t\u3000"])
    return random_.choice(
        [
            text[start : start + length],
            text[start : start + length],
            "".join(random_.choices(alphabet, k=length)),
            random_.choice(["ab", "aab", "-", "=", "000", "e\u0301", "\U0001f680"]) * length,
            HARD[:length],
        ]
    )


def test_windows_give_the_tokens_of_the_complete_document(tokenizer, sample_texts, monkeypatch):
    source = "\n".join(sample_texts)
    for name, value in (("WINDOW", 2048), ("OVERLAP", 512), ("LONG", 0)):
        monkeypatch.setattr(document_encoding, name, value)
    random_ = random.Random(1)
    for _ in range(6):
        text = "".join(_piece(random_, source) for _ in range(random_.randrange(20, 40)))
        (expected,) = tokenizer.encode_batch([text])
        np.testing.assert_array_equal(encode_document(tokenizer, text), expected)


def test_memory_is_bounded_by_the_window(tokenizer, sample_texts, monkeypatch, request):
    """No call encodes more than a window, except with a Unigram model."""
    monkeypatch.setattr(document_encoding, "WINDOW", 1 << 13)
    monkeypatch.setattr(document_encoding, "OVERLAP", 1 << 10)
    monkeypatch.setattr(document_encoding, "LONG", 1 << 15)
    text, lengths = "\n".join(sample_texts)[:100_000], []
    encode = tokenizer.encode_batch

    def recording(texts: list[str]) -> list[list[int]]:
        lengths.extend(map(len, texts))
        return encode(texts)

    monkeypatch.setattr(tokenizer, "encode_batch", recording)
    document = encode_document(tokenizer, text)
    is_unigram = "unigram" in request.node.callspec.id
    assert tokenizer.supports_windows is not is_unigram
    assert max(lengths) == (len(text) if is_unigram else 1 << 13)
    assert sum(lengths) < 1.3 * len(text)
    np.testing.assert_array_equal(document, encode([text])[0])


def test_windows_that_end_in_long_words(tokenizer, monkeypatch):
    for name, value in (("WINDOW", 2048), ("OVERLAP", 512), ("LONG", 0)):
        monkeypatch.setattr(document_encoding, name, value)
    numbers = ("word " * 20 + "0001110" * 60) * 30
    runs = ["ab" * 5000, "7" * 10_001, " " * 10_001, "\n" * 10_001, "ab" * 3000 + " x" * 3000]
    for text in (numbers, *runs):
        (expected,) = tokenizer.encode_batch([text])
        np.testing.assert_array_equal(encode_document(tokenizer, text), expected)
