"""Instructions are packed whole, written with a mask, and read as batches with masked labels."""

import random
import sys

import numpy as np
import pytest

from megagrow.cli.app import main
from megagrow.config.schema import CorpusConfig, StageDataConfig
from megagrow.data.batches import Batch, BatchReader, open_stream
from megagrow.data.indexed import IndexedCorpus, IndexedWriter
from megagrow.data.manifest import verify
from megagrow.data.sft import TokenizedExample, open_mask, pack, read_examples, tokenize
from megagrow.data.tokenizers import load_tokenizer
from megagrow.errors import InputError
from tests.helpers.alpaca import VOCAB, prepare, records, tokenizer, write_alpaca

LENGTH = 160


def test_packing_keeps_items_whole_and_fills_the_fullest_row():
    assert pack([5, 4, 3, 2, 6, 1], 8) == [[0, 2], [1, 3, 5], [4]]
    generator = random.Random(3)
    lengths = [generator.randint(1, 60) for _ in range(1000)]
    rows = pack(lengths, 60)
    assert sorted(item for row in rows for item in row) == list(range(1000))
    assert max(sum(lengths[item] for item in row) for row in rows) <= 60
    assert len(rows) * 60 < 1.05 * sum(lengths)
    # No two rows are so empty that one would have done.
    used = sorted(sum(lengths[item] for item in row) for row in rows)
    assert used[0] + used[1] > 60


def read(folder, rows: range, length: int = LENGTH, shuffle: bool = False) -> Batch:
    """Rows of the training corpus, as a run with objective: sft reads them."""
    corpora = [CorpusConfig(path=folder / "corpus" / "train")]
    stream = open_stream(corpora, 0, length, shuffle)
    data = StageDataConfig(
        train=corpora, sequence_length=length, reset_position_ids=True, reset_attention_mask=True
    )
    mask = open_mask(stream, corpora, 0, length, shuffle)
    return BatchReader(stream, data, VOCAB, mask).read(0, list(rows))


def examples(folder, length: int = LENGTH) -> list[TokenizedExample]:
    loaded = load_tokenizer(tokenizer(folder))
    found = [tokenize(loaded, example) for example in read_examples(folder / "alpaca.json")]
    return [TokenizedExample(e.ids[:length], e.prompt) for e in found if e.prompt < length]


def test_batches_hold_whole_examples_with_labels_on_answers_only(tmp_path):
    manifest, said = prepare(tmp_path, 40, LENGTH, validation_fraction=0)
    assert verify(tmp_path / "corpus") == manifest and manifest.sequence_length == LENGTH
    split = manifest.splits["train"]
    rows, eos = split.tokens // LENGTH, load_tokenizer(tokenizer(tmp_path)).eos_id
    assert split.documents == 40 and f"40 examples in {rows} rows of 160 tokens" in said
    assert 1 < rows < 40
    batch, todo = read(tmp_path, range(rows)), examples(tmp_path)
    layout = pack([len(example.ids) for example in todo], LENGTH)
    for row, items in enumerate(layout):
        ids, labels, positions, documents = [], [], [], []
        for place, example in enumerate(todo[item] for item in items):
            size = len(example.ids)
            ids += example.ids
            labels += [-100] * (example.prompt - 1) + example.ids[example.prompt :] + [-100]
            positions += range(size)
            documents += [place] * size
        rest = LENGTH - len(ids)
        assert batch.input_ids[row].tolist() == ids + [eos] * rest
        assert batch.labels[row].tolist() == labels + [-100] * rest
        assert batch.position_ids[row].tolist() == positions + list(range(rest))
        assert batch.document_ids[row].tolist() == documents + [len(items)] * rest
    answers = sum(len(example.ids) - example.prompt for example in todo)
    assert f"{answers / split.tokens:.1%} of the tokens are answer" in said


def test_a_shuffled_epoch_reads_every_row_once(tmp_path):
    prepare(tmp_path, 40, LENGTH, validation_fraction=0)
    rows = IndexedCorpus(tmp_path / "corpus" / "train").num_tokens // LENGTH
    plain, mixed = (read(tmp_path, range(rows), shuffle=s) for s in (False, True))
    pairs = [
        [(i.tolist(), m.tolist()) for i, m in zip(b.input_ids, b.labels, strict=True)]
        for b in (plain, mixed)
    ]
    assert sorted(pairs[0]) == sorted(pairs[1]) and pairs[0] != pairs[1]


def test_long_answers_are_cut_and_long_prompts_left_out(tmp_path):
    tokenizer(tmp_path)
    made = write_alpaca(tmp_path / "alpaca.json", records(12))
    sizes = [(e.prompt, len(e.ids)) for e in examples(tmp_path, 10**6)]
    length = sorted(prompt for prompt, _ in sizes)[-3]
    left_out = sum(prompt >= length for prompt, _ in sizes)
    cut = sum(prompt < length < size for prompt, size in sizes)
    assert left_out and cut and made.exists()
    manifest, said = prepare(tmp_path, 12, length, validation_fraction=0)
    assert f"{cut} answers truncated, {left_out} examples dropped" in said
    assert manifest.splits["train"].documents == 12 - left_out
    rows = manifest.splits["train"].tokens // length
    labels = read(tmp_path, range(rows), length).labels
    assert (labels != -100).sum() == sum(min(s, length) - p for p, s in sizes if p < length)
    with pytest.raises(InputError, match=r"shorter than 3 tokens \(12 dropped\)"):
        prepare(tmp_path, 12, 3)
    again, said = prepare(tmp_path, 12, length, validation_fraction=0)
    assert again == manifest and "corpus: complete and unchanged, nothing to do" in said
    with pytest.raises(InputError, match=r"corpus: already exists, .* pass --overwrite to replace"):
        prepare(tmp_path, 12, length, validation_fraction=0.3)
    assert verify(tmp_path / "corpus") == manifest
    changed, said = prepare(tmp_path, 12, length, validation_fraction=0.3, overwrite=True)
    assert verify(tmp_path / "corpus") == changed and set(changed.splits) == {"train", "validation"}
    assert f"{tmp_path / 'corpus' / 'train'}: " in said


def test_the_command_prepares_both_splits_the_same_way_each_time(tmp_path, monkeypatch, capsys):
    source = write_alpaca(tmp_path / "a.jsonl", records(60))
    words = ["megagrow", "prepare-sft", str(source), "--tokenizer", str(tokenizer(tmp_path))]
    words += ["--sequence-length", "160", "--validation-fraction", "0.2", "--output"]
    found = []
    for name in ("one", "two"):
        monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / name)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0, capsys.readouterr().err
        found.append(verify(tmp_path / name))
    assert found[0] == found[1]
    assert sum(split.documents for split in found[0].splits.values()) == 60
    assert 2 < found[0].splits["validation"].documents < 30


def test_masks_that_do_not_belong_to_the_tokens_are_named(tmp_path):
    prepare(tmp_path, 20, LENGTH, validation_fraction=0)
    with pytest.raises(InputError, match=r"rows of 160 tokens, .* is 64"):
        read(tmp_path, range(1), length=64)
    mask = tmp_path / "corpus" / "train.mask"
    with IndexedWriter(mask, np.dtype("<u1")) as writer:
        writer.add_document(np.ones(7))
        writer.finalize()
    with pytest.raises(InputError, match=r"train\.mask\.bin: the mask has 7 tokens, the"):
        read(tmp_path, range(1))
    (tmp_path / "corpus" / "train.mask.idx").unlink()
    with pytest.raises(InputError, match=r"train\.mask\.idx: no such file; .* prepare-sft"):
        read(tmp_path, range(1))
