"""Tokenizers that somebody else has made, to do harm or by mistake."""

import json
import os
import resource
import time
from pathlib import Path

import pytest

from megagrow.data import tokenizers
from megagrow.data.tokenizers import load_tokenizer
from megagrow.data.workers import run_limited
from megagrow.errors import DataError, InputError


def word_level(**changes: object) -> dict[str, object]:
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1, "<unk>": 2}, "unk_token": "<unk>"}
    nothing = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    whole = {"version": "1.0", "added_tokens": [], "model": model | changes}
    return whole | dict.fromkeys(nothing)


def test_a_vocabulary_without_its_unknown_token_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(word_level(vocab={"</s>": 0, "a": 1})))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode_batch(["a"]) == [[1]]
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot encode a text"):
        tokenizer.encode_batch(["b"])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[]", "must contain a JSON object"),
        ("{", "not JSON"),
        ('{"eos_token": 3}', "'eos_token' must be the text of a token"),
        ('{"eos_token": {"lstrip": false}}', "'eos_token' must be the text of a token"),
        ('{"eos_token": ["</s>"]}', "'eos_token' must be the text of a token"),
    ],
)
def test_a_damaged_configuration_beside_a_tokenizer(tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(word_level()))
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(InputError, match=rf"tokenizer_config\.json: .*{said}"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    """The library would ask on the terminal whether it may, and wait for an answer."""
    pytest.importorskip("transformers")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"no tokenizer found: .*contains custom code"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3}', '{"tokenizer_class": 5}'])
def test_a_damaged_folder_of_theirs_is_named(tmp_path: Path, content: str) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InputError, match=r"theirs: no tokenizer found: ."):
        load_tokenizer(folder, is_tried=True)


def test_an_id_that_would_fill_the_memory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(word_level(vocab={"</s>": 0, "a": 2**31, "<unk>": 2})))
    with pytest.raises(InputError, match=r"tokenizer\.json: a token has the id 2147483648"):
        load_tokenizer(path)


def replaced(old: str, new: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def bomb(kind: str, old: str) -> dict[str, object]:
    """A tokenizer.json whose normalizer or decoder makes 10 ** 12 characters of one."""
    steps = [replaced(old, "b" * 100), *[replaced("b", "b" * 100)] * 5]
    name = "normalizers" if kind == "normalizer" else "decoders"
    return word_level() | {kind: {"type": "Sequence", name: steps}}


@pytest.mark.parametrize(
    ("kind", "old"), [("normalizer", "a"), ("normalizer", "\u2603"), ("decoder", "a")]
)
def test_a_replacement_bomb_does_not_take_the_memory_of_this_process(
    tmp_path: Path, kind: str, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "TRIAL_BYTES", 2**29)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(bomb(kind, old)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"json: the tokenizer takes more than 512 MiB of memory"):
        load_tokenizer(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_tokenizer_that_multiplies_every_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    normalizer = {"type": "Sequence", "normalizers": [replaced("a", "b" * 999)]}
    path.write_text(json.dumps(word_level() | {"normalizer": normalizer}))
    with pytest.raises(InputError, match=r"json: the tokenizer expands a text of \d+ characters"):
        load_tokenizer(path)


def test_padding_of_a_billion_tokens_is_not_applied(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "</s>"}
    path.write_text(json.dumps(word_level() | {"padding": padding}))
    assert load_tokenizer(path).encode_batch(["a"]) == [[1]]


def test_a_panic_of_the_library_is_one_line(tmp_path: Path) -> None:
    """It is no `Exception` of Python."""
    path = tmp_path / "tokenizer.json"
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps(word_level() | {"normalizer": charsmap}))
    with pytest.raises(InputError, match=r"not a tokenizer\.json: Precompiled: .*Cannot parse"):
        load_tokenizer(path, is_tried=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "folder/vocab.json"])
def test_a_tokenizer_of_a_gigabyte_is_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.truncate(path, 10**9)
    given = path.parent if name.startswith("folder") else path
    with pytest.raises(InputError, match=rf"{name}: larger than the limit of 200000000 bytes"):
        load_tokenizer(given)


def waiting(seconds: str) -> str:
    end = time.process_time() + float(seconds)
    while time.process_time() < end:
        pass
    return "waited"


def allocating(size: str) -> str:
    return str(bytearray(int(size)))[:0]


def failing(message: str) -> str:
    raise DataError(message)


@pytest.mark.parametrize(
    ("function", "text", "problem"),
    [
        (waiting, "0", "waited"),
        (waiting, "9", "takes more than 1 s of CPU time"),
        (allocating, "1000", ""),
        (allocating, str(2**40), "takes more than 64 MiB of memory"),
    ],
)
def test_a_call_within_limits(function, text: str, problem: str) -> None:
    assert run_limited(function, text, 2**26, 1) == problem


def test_an_error_of_a_call_within_limits_is_raised() -> None:
    with pytest.raises(DataError, match="x: is damaged"):
        run_limited(failing, "x: is damaged", 2**26, 1)
