"""Malicious run files, JSON and file names are rejected quickly, with a one-line error."""

import time
from pathlib import Path

import pytest

from megagrow.common.json_text import parse_json, read_json
from megagrow.common.untrusted_values import is_inner_path, is_plain_name
from megagrow.common.yaml_file import DEPTH, FILE_BYTES, VALUES, parse_yaml, read_mapping
from megagrow.config.load import load_run
from megagrow.errors import Diverged, InputError


def laughs(levels: int, share: str) -> str:
    """Nested lists of ten; `share` is the format in which a level contains the one below."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        below = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} {share.format(below)}")
    return "\n".join(lines)


DEEP_MERGE = "\n".join(
    ["a0: &a0 {k0: 1}"]
    + [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], k{i}: 1}}" for i in range(1, 40)]
)
HOSTILE = {
    "billion laughs": (laughs(9, "[{}]"), f"line 5: expands to more than {VALUES} values"),
    "laughs of keys": (laughs(9, "{{k: [{}]}}"), f"expands to more than {VALUES} values"),
    "laughs of merges": (DEEP_MERGE, f"expands to more than {VALUES} values"),
    "an alias of itself": ("a: &a [*a]", "line 1: an alias refers to a value that contains it"),
    "an alias of itself below": ("a: &a {b: [{c: *a}]}", "an alias refers to a value"),
    "deep": ("[" * 1000 + "]" * 1000, f"more than {DEPTH} nested mappings and lists"),
    "deep blocks": (
        "\n".join(" " * i + "a:" for i in range(400)),
        f"more than {DEPTH} nested mappings",
    ),
    "a huge number": ("a: " + "9" * 5000, "line 1: a number of 5000 characters"),
    "a huge number in hex": ("a: 0x" + "f" * 100_000, "a number of 100002 characters"),
    "a huge number of seconds": ("a: " + "1:" * 9999 + "1", "a number of 19999 characters"),
    "a tag of Python": ("a: !!python/object/apply:os.system [id]", "line 1: a tag, tag:yaml.org"),
    "a tag that fits nothing": ("a: !!int ''", "line 1: a tag, tag:yaml.org,2002:int"),
    "a control character": ('a: "\\e[2J"', "line 1: a control character in a text"),
    "half a character": ('a: "\\ud800"', "line 1: half of a surrogate pair in a text"),
    "a null in a path": ('a: "x\\0y"', "line 1: a control character in a text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_yaml(tmp_path: Path, name: str) -> None:
    text, message = HOSTILE[name]
    (tmp_path / "run.yaml").write_text(text)
    begin = time.perf_counter()
    with pytest.raises(InputError, match=r"run\.yaml") as caught:
        load_run(tmp_path / "run.yaml")
    assert message in str(caught.value)
    assert time.perf_counter() - begin < 10


MANY = {
    "unknown keys": "model: {" + ", ".join(f"k{n}: 1" for n in range(1500)) + "}",
    "unknown keys at the top": "".join(f"k{n}: 1\n" for n in range(1500)),
    "stages": "stages: [" + "{tokens: 1}," * 1000 + "]",
    "a list of the wrong type": "stages: [" + "{tokens: []}," * 1000 + "]",
}


@pytest.mark.parametrize("name", MANY)
def test_the_first_of_many_problems_are_listed(tmp_path: Path, name: str) -> None:
    """A hint for each of 50,000 unknown keys took minutes."""
    (tmp_path / "run.yaml").write_text(MANY[name])
    begin = time.perf_counter()
    with pytest.raises(InputError, match=r"run\.yaml: .*; and more$") as caught:
        load_run(tmp_path / "run.yaml")
    assert len(str(caught.value)) <= 4000
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize("key", ["base", "model"])
def test_a_long_chain_of_files_is_refused(tmp_path: Path, key: str) -> None:
    (tmp_path / "model").mkdir()
    folder = tmp_path / "model" if key == "model" else tmp_path
    for number in range(200):
        (folder / f"f{number}.yaml").write_text(f"base: f{number + 1}\n")
    (tmp_path / "run.yaml").write_text(f"{key}: f0\n")
    with pytest.raises(InputError, match="through more than 10 files"):
        load_run(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"output_dir={'x' * 300}", "is longer than the file system allows: 255 bytes"),
        (f"data.train.0.path={'a/' * 2500}x", "is longer than the file system allows"),
        ('init_from="a\\tb"', "contains a control character"),
        ('name="a\\nb"', "contains a line break"),
        (f"name={'x' * 201}", "at most 200 characters"),
        (f"seed={2**63}", "does not fit into 64 bits"),
    ],
)
def test_names_and_seeds_that_cannot_be_used(
    run_file_text: str, tmp_path: Path, override: str, message: str
) -> None:
    (tmp_path / "run.yaml").write_text(run_file_text)
    with pytest.raises(InputError, match=message):
        load_run(tmp_path / "run.yaml", [override])


def test_a_file_that_is_no_run_file_is_not_read_whole(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"/dev/zero: larger than the limit of {FILE_BYTES} bytes"):
        read_mapping(Path("/dev/zero"))


def test_anchors_of_honest_files_work() -> None:
    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: [*a, *a]"
    a = {"x": 1, "y": [1, 2]}
    assert parse_yaml(text, "here") == {"a": a, "b": a | {"x": 2}, "c": [a, a]}


@pytest.mark.parametrize("count", ["1e40", "2e27", "1e99T", "9" * 60])
def test_counts_that_no_float_could_hold(run_file_text, tmp_path: Path, count: str) -> None:
    (tmp_path / "run.yaml").write_text(run_file_text)
    with pytest.raises(InputError, match=r"'tokens' = .*is more than 1e\+27"):
        load_run(tmp_path / "run.yaml", [f"tokens={count}"])


def test_more_layers_than_tables_have_room_for(run_file_text, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(run_file_text)
    with pytest.raises(InputError, match=r"num_hidden_layers.*less than or equal to 10000"):
        load_run(tmp_path / "run.yaml", ["model.num_hidden_layers=1B"])


def test_a_list_that_is_too_short_is_named(run_file_text, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(run_file_text)
    with pytest.raises(InputError, match=r"'optimizer\.betas"):
        load_run(tmp_path / "run.yaml", ["optimizer.betas=[]"])


def test_a_part_whose_name_no_file_can_have(run_file_text, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(run_file_text)
    with pytest.raises(InputError, match="longer than 200 characters; not a file name"):
        load_run(tmp_path / "run.yaml", [f"model={'x' * 300}"])


@pytest.fixture
def run_file_text() -> str:
    return (
        "name: x\noutput_dir: out\n"
        "data: {train: [{path: x}], sequence_length: 16}\n"
        "model: {num_hidden_layers: 1, hidden_size: 8, num_attention_heads: 2,"
        " intermediate_size: 8, vocab_size: 8}\n"
        "tokens: 1K\nbatch: {global_batch_size: 1, micro_batch_size: 1}\noptimizer: {lr: 1}\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"a": {"b": 1, "b": 1}}', "duplicate key 'b'"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not a JSON number"),
        (b"[1e999]", "1e999 is too large"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["\\ud800"]', "surrogates not allowed"),
        (b'["\\udc00 \\uD83D"]', "surrogates not allowed"),
        (b"\xff\xfe[\x00]\x00", "can't decode byte 0xff"),
        (b"[" + b"9" * 5000 + b"]", "a number of 5000 digits"),
        (b'{"a": -' + b"9" * 40 + b"}", "a number of 41 digits"),
        (b"[" + b"[]," * 1_000_000 + b"1]", "more than 2000000 values"),
    ],
)
def test_json(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(InputError, match=rf"x\.json: not JSON \(.*{message}"):
        read_json(tmp_path / "x.json")


def test_json_of_honest_files_is_read() -> None:
    text = b'{"a": [1, -2.5, true, null], "\\u00e9\\ud83d\\ude80": {}}'
    assert parse_json(text) == {"a": [1, -2.5, True, None], "\u00e9\U0001f680": {}}


@pytest.mark.parametrize(
    ("name", "plain", "inner"),
    [
        ("model.safetensors", True, True),
        ("tokenizer/tokenizer.json", False, True),
        *((name, False, False) for name in ("", ".", "..", "../x", "/etc/passwd", "a/../b")),
        *((name, False, False) for name in ("a//b", "a/", "x\0", "x\ny", "\u202ex", "x" * 256)),
        *((name, False, False) for name in (None, 3, ["x"])),
    ],
)
def test_names_of_files_stay_in_their_folder(name: object, plain: bool, inner: bool) -> None:
    assert (is_plain_name(name), is_inner_path(name)) == (plain, inner)


def test_a_message_does_nothing_to_a_terminal() -> None:
    error = InputError("step-\x1b[2J\r\u202e\ud800: caf\u00e9\nexit 0")
    assert str(error) == "step-\\x1b[2J\\r\\u202e\\ud800: caf\u00e9\\nexit 0"
    assert str(Diverged("x\x1b[2J")) == "x\\x1b[2J"


def test_a_long_message_keeps_its_ends() -> None:
    message = str(InputError("run.yaml" + "x" * 100_000 + "; remove it"))
    assert len(message) <= 4000
    assert message.startswith("run.yaml") and message.endswith("; remove it") and "[...]" in message
