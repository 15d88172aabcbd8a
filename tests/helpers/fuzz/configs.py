"""Targets: run files, overrides of them, and tokenizers."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml
from hypothesis import strategies as st

from megagrow.config.load import load_run, to_yaml
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.data.tokenizers import load_tokenizer
from megagrow.growth.validation import growth_problems
from tests.helpers.fuzz.mutations import TEXTS, at, damaged, mutated_bytes, paths, wild
from tests.helpers.fuzz.running import Target

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 101,
}
RUN: dict[str, Any] = {
    "name": "fuzz",
    "seed": 3,
    "output_dir": "runs/fuzz",
    "data": {"train": [{"path": "data/train", "weight": 1.5}], "sequence_length": 16},
    "parallel": {"zero_stage": 2, "tensor_model_parallel_size": 1},
    "batch": {"global_batch_size": 4, "micro_batch_size": 1},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "schedule": {"type": "wsd", "warmup_steps": 3},
    "checkpoint": {"interval": "1K"},
    "stages": [
        {"model": SMALL, "tokens": "64K"},
        {
            "model": SMALL | {"num_hidden_layers": 4},
            "at_tokens": "1M",
            "growth": {"operator": ["direct_depth"], "optimizer_state": "transport"},
        },
    ],
}
SPECIAL = [
    b"a: &a [1, 1]\nb: &b [*a, *a]\nname: *b\n",
    b"base: &base {lr: 1}\noptimizer: {<<: *base, lr: 2}\n",
    b"name: !!python/object/apply:os.system ['touch canary']\n",
    b"a: &a [*a]\n? [1, 2]\n: {x: y}\n",
    b"seed: 1:59:59\nname: 2024-01-01\noutput_dir: ~\n--- \nb: 0x1F\n",
    b"name: |\n  text\nmodel: llama-1.1b\ndata: {train: [{path: x}]}\n",
]
"""Texts with what a dumped tree never has: anchors, merges, tags, blocks, documents."""

TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {"</s>": 0, "a": 1, "b": 2, "<unk>": 3},
        "unk_token": "<unk>",
    },
}


def _load_run_file(folder: Path, raw: bytes) -> None:
    path = folder / "run.yaml"
    path.write_bytes(raw)
    run = load_run(path)
    growth_problems(run)
    path.write_text(to_yaml(run), encoding="utf-8")
    assert load_run(path) == run


def _load_override(folder: Path, text: str) -> None:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(RUN), encoding="utf-8")
    run = load_run(path, [text])
    path.write_text(to_yaml(run), encoding="utf-8")
    assert load_run(path) == run


@st.composite
def _overrides(draw: st.DrawFn) -> str:
    """`path.to.key=value`: a place of the run file, or none, and a value of any kind."""
    place = ".".join(map(str, draw(st.sampled_from(list(paths(RUN))))))
    place = draw(st.one_of(st.just(place), st.sampled_from(TEXTS), st.text(max_size=10)))
    value = draw(st.one_of(st.sampled_from(TEXTS), wild.map(lambda v: json.dumps(v))))
    if draw(st.booleans()):
        value = str(at(RUN, draw(st.sampled_from(list(paths(RUN))))))
    return f"{place}{draw(st.sampled_from(('=', '=', '=', '', '==', ' = ')))}{value}"


def _load_tokenizer(folder: Path, given: tuple[bytes, bytes]) -> None:
    path = folder / "tokenizer.json"
    for file, raw in zip((path, folder / "tokenizer_config.json"), given, strict=True):
        file.write_bytes(raw)
    tokenizer = load_tokenizer(path, is_tried=True)
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    for ids in tokenizer.encode_batch(["a b c", ""]):
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


@cache
def _sentencepiece() -> bytes:
    """A small model, trained once."""
    path = Path(mkdtemp()) / "small.model"
    train_sentencepiece(["one two three", "two and three\n", "a b c d e f g"] * 20, 300, path)
    return path.read_bytes()


def _load_sentencepiece(folder: Path, raw: bytes) -> None:
    path = folder / "tokenizer.model"
    path.write_bytes(raw)
    tokenizer = load_tokenizer(path, is_tried=True)
    assert 0 <= tokenizer.eos_id < tokenizer.vocab_size
    for ids in tokenizer.encode_batch(["one two\n three", ""]):
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        tokenizer.decode(ids)


def _dumped(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


TARGETS = [
    Target(
        "run file",
        st.one_of(damaged(RUN, _dumped), st.sampled_from(SPECIAL).flatmap(mutated_bytes)),
        _load_run_file,
    ),
    Target("--set", _overrides(), _load_override),
    Target(
        "tokenizer.json",
        st.tuples(damaged(TOKENIZER), damaged({"eos_token": {"content": "</s>"}})),
        _load_tokenizer,
    ),
    Target(
        "tokenizer.model",
        st.deferred(lambda: mutated_bytes(_sentencepiece())),
        _load_sentencepiece,
    ),
]
