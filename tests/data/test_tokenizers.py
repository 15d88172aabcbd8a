"""Tokenizers: text comes back as it was, documents cannot end themselves, mistakes are named."""

import json
import shutil

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.data import hugging_face_tokenizers
from megagrow.data import sentencepiece_tokenizer as ours
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.data.tokenizers import check_tokenizer, load_tokenizer
from megagrow.errors import InputError
from megagrow.evaluation.tokenizer import open_tokenizer

HARD = [
    "",
    "plain",
    " leading and trailing ",
    "    four\n\n\n\tand tab\r\n",
    "caf\u00e9 \u4f60\u597d \U0001f680 \ufb01 e\u0301 \ufeff",
    "1234567890",
    "</s><s><unk> <0x0A>",
    "nul \x00 and bell \x07",
]


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory, sample_texts):
    """A folder as save_pretrained makes it, whose EOS has an unusual name."""
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|fin|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts, trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|fin|>")
    folder = tmp_path_factory.mktemp("hf")
    wrapped.save_pretrained(folder)
    return folder


def test_ids_are_those_of_llama(model_path):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id()) == (0, 1, 2)
    assert processor.vocab_size() == 600
    tokenizer = load_tokenizer(model_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (600, 2)
    pieces = [processor.id_to_piece(i) for i in range(600)]
    assert "<0x00>" in pieces and "<0xFF>" in pieces
    assert not any(len(piece) > 1 and any(map(str.isdigit, piece)) for piece in pieces[259:])


def test_training_twice_gives_the_same_file(model_path, sample_texts, tmp_path):
    train_sentencepiece(iter(sample_texts), 600, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == model_path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.model"]


@pytest.mark.parametrize("kind", ["model", "json", "folder"])
def test_text_comes_back_as_it_was(request, kind, model_path, sample_texts):
    names = {"model": lambda: model_path}
    names["folder"] = lambda: request.getfixturevalue("json_folder")
    names["json"] = lambda: request.getfixturevalue("json_folder") / "tokenizer.json"
    tokenizer = load_tokenizer(names[kind]())
    texts = [*HARD, *sample_texts]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    for ids in encoded:
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.eos_id not in ids
    assert sum(map(len, sample_texts)) > 1.5 * sum(map(len, encoded))


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
@settings(max_examples=100, deadline=None)
def test_any_unicode_comes_back(model_path, text):
    tokenizer = load_tokenizer(model_path)
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_the_eos_in_a_text_is_text_for_hugging_face_too(json_folder):
    for name in (json_folder, json_folder / "tokenizer.json"):
        tokenizer = load_tokenizer(name)
        (ids,) = tokenizer.encode_batch(["a <|fin|> b"])
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == "a <|fin|> b"


def test_long_texts_in_pieces_give_the_same_tokens(model_path, sample_texts, monkeypatch):
    text = "\n\n  ".join(sample_texts) + "  \n "
    tokenizer = load_tokenizer(model_path)
    monkeypatch.setattr(ours, "PIECE_LENGTH", 1 << 40)
    whole = tokenizer.encode_batch([text, "x", text])
    monkeypatch.setattr(ours, "PIECE_LENGTH", 100)
    assert len(tokenizer._split(text)) > 100
    assert tokenizer.encode_batch([text, "x", text]) == whole


def test_a_model_that_adds_spaces_is_not_cut(tmp_path, sample_texts):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(sample_texts).split("\n")),
        model_prefix=str(tmp_path / "llama"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "llama.model")
    text = "some line\n" * 20_000
    assert tokenizer._split(text) == [text]
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


@pytest.mark.parametrize("kind", ["model", "json", "folder"])
def test_a_saved_tokenizer_is_the_same_one(request, kind, model_path, tmp_path):
    name = model_path
    if kind != "model":
        name = request.getfixturevalue("json_folder")
        name = name / "tokenizer.json" if kind == "json" else name
    tokenizer = load_tokenizer(name)
    main = tokenizer.save(tmp_path)[0]
    again = load_tokenizer(main.parent if kind == "folder" else main)
    assert (again.checksum, again.eos_id) == (tokenizer.checksum, tokenizer.eos_id)


def test_a_vocabulary_larger_than_the_models_is_refused(model_path):
    check_tokenizer(model_path, 600)
    with pytest.raises(InputError, match=r"small\.model: the tokenizer has 600 tokens, more"):
        check_tokenizer(model_path, 599)


def _without_eos(kind, folder, sample_texts, json_folder):
    """Write a tokenizer that does not declare an EOS token and return its file or folder."""
    if kind == "model":
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(sample_texts).split("\n")),
            model_prefix=str(folder / "none"),
            vocab_size=300,
            eos_id=-1,
            user_defined_symbols=["<|fin|>"],
            hard_vocab_limit=False,
            minloglevel=2,
        )
        return folder / "none.model"
    (folder / "tokenizer.json").write_bytes((json_folder / "tokenizer.json").read_bytes())
    return folder if kind == "folder" else folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["model", "json", "folder"])
def test_eos_is_found_in_the_files_next_to_the_tokenizer(tmp_path, sample_texts, json_folder, kind):
    (tmp_path / "in").mkdir()
    path = _without_eos(kind, tmp_path / "in", sample_texts, json_folder)
    if kind == "folder":
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="the tokenizer has no EOS token"):
        load_tokenizer(path)
    number = 2 if kind == "model" else 0
    for name, content in [
        ("config.json", {"eos_token_id": number}),
        ("generation_config.json", {"eos_token_id": [number, 7]}),
        ("special_tokens_map.json", {"eos_token": {"content": "<|fin|>"}}),
        ("tokenizer_config.json", {"eos_token": "<|fin|>"}),
    ]:
        (tmp_path / "in" / name).write_text(json.dumps(content))
        tokenizer = load_tokenizer(path)
        assert tokenizer.eos_id == number
        (tmp_path / name).mkdir()
        main = tokenizer.save(tmp_path / name)[0]
        again = load_tokenizer(main.parent if kind == "folder" else main)
        assert (again.checksum, again.eos_id) == (tokenizer.checksum, number)
        (tmp_path / "in" / name).unlink()


@pytest.mark.parametrize("value", ["<|none|>", 10**6, -1, True, [], {"id": 0}])
def test_a_wrong_eos_in_a_file_is_named(tmp_path, sample_texts, json_folder, value):
    path = _without_eos("json", tmp_path, sample_texts, json_folder)
    name = "special_tokens_map" if isinstance(value, str) else "generation_config"
    key = "eos_token" if isinstance(value, str) else "eos_token_id"
    (tmp_path / f"{name}.json").write_text(json.dumps({key: value}))
    with pytest.raises(InputError, match="no EOS token" if value == [] else f"{name}.json: "):
        load_tokenizer(path)


@pytest.mark.parametrize("kind", ["json", "folder", "evaluation"])
def test_documents_are_encoded_completely(tmp_path, json_folder, sample_texts, kind):
    """Truncation, padding, BPE dropout and templates in tokenizer.json change no token."""
    library = pytest.importorskip("tokenizers")
    shutil.copytree(json_folder, tmp_path / "in")
    path = tmp_path / "in" / "tokenizer.json"
    changed = library.Tokenizer.from_file(str(path))
    expected = changed.encode(sample_texts[0]).ids
    changed.enable_truncation(512)
    changed.enable_padding(length=700, pad_id=0, pad_token="<|fin|>")
    changed.model.dropout = 0.5
    if kind != "evaluation":  # which adds the tokens of a template
        changed.post_processor = library.processors.TemplateProcessing(
            single="<|fin|> $A <|fin|>", special_tokens=[("<|fin|>", 0)]
        )
    changed.save(str(path))
    if kind == "evaluation":
        assert open_tokenizer(str(tmp_path / "in"), 500).encode(sample_texts[0]) == expected
        return
    tokenizer = load_tokenizer(path if kind == "json" else path.parent)
    main = tokenizer.save(tmp_path)[0]
    again = load_tokenizer(main if kind == "json" else main.parent)
    assert again.checksum == tokenizer.checksum
    for loaded in (tokenizer, again):
        assert loaded.encode_batch([sample_texts[0], "a"])[0] == expected
    saved = library.Tokenizer.from_file(
        str(tmp_path / ("" if kind == "json" else "tokenizer") / "tokenizer.json")
    )
    assert saved.encode(sample_texts[0], add_special_tokens=False).ids == expected


@pytest.mark.parametrize("name", ["missing.model", "missing.json", "missing-folder"])
def test_missing_tokenizers_are_named(tmp_path, name):
    with pytest.raises(InputError, match=name):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name", ["broken.model", "broken.json"])
@pytest.mark.parametrize("content", [b"", b"no tokenizer at all"])
def test_broken_tokenizers_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: not a"):
        load_tokenizer(tmp_path / name)


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    def refuse(name, *arguments):
        raise ImportError(name)

    monkeypatch.setattr(hugging_face_tokenizers.importlib, "import_module", refuse)
    with pytest.raises(InputError, match=r"pip install megagrow\[hf\]"):
        load_tokenizer(str(tmp_path), is_tried=True)


@pytest.mark.parametrize("size", [100, 100_000])
def test_impossible_vocabulary_sizes_are_named(tmp_path, sample_texts, size):
    with pytest.raises(InputError, match=f"vocab_size {size} does not fit") as caught:
        train_sentencepiece(sample_texts, size, tmp_path / "m.model")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
