"""Targets: indexed corpora and their manifests, metrics, journals."""

import json
import struct
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from rich.console import Console

from megagrow.analysis.curves import RunCurves, Series, load_curves
from megagrow.analysis.report.tables import (
    as_markdown,
    growth_table,
    run_table,
    score_table,
    speedup_table,
)
from megagrow.analysis.seeds import Matchup, SeedGroup
from megagrow.common.tables import print_lines
from megagrow.data.indexed import IndexedCorpus
from megagrow.data.manifest import FORMAT, NAME, CorpusManifest, verify
from megagrow.errors import InputError
from megagrow.offline.journal import JOURNAL_FILE, Journal
from megagrow.train.reporting.metrics import METRICS_FILE, Counters, MetricsLog, read_metrics
from tests.helpers.fuzz.mutations import NUMBERS, damaged, mutated_bytes
from tests.helpers.fuzz.running import Target

LENGTHS, DOCUMENTS = [3, 1, 2, 4], [0, 2, 3, 4]
BIN = struct.pack("<10H", *range(5, 15))
CORPUS = {
    "magic": b"MMIDIDX\x00\x00",
    "head": [1, 8, 4, 4],
    "lengths": LENGTHS,
    "pointers": [0, 6, 8, 12],
    "documents": DOCUMENTS,
}
COMMAND = {"to": "llama", "seed": 1}
COUNTERS = {
    "step": 1,
    "tokens": 64,
    "flops": 2.5,
    "flops_true": 2.5,
    "elapsed_seconds": 1.0,
    "stage": 0,
}
LATER = COUNTERS | {"step": 2, "tokens": 128, "flops": 7.5, "flops_true": 8.5, "stage": 1}
RECORDS = [
    {"kind": "start", **COUNTERS, "name": "x", "seed": 1, "parameters": [10, 20], "run_steps": 1},
    {"kind": "train", **COUNTERS, "loss": 4.0, "grad_norm": 1.0},
    {"kind": "validation", **COUNTERS, "loss": 4.0},
    {"kind": "growth", **(COUNTERS | {"stage": 1}), "layers": [0, -1], "operator": "zero_depth"},
    {"kind": "train", **LATER, "loss": 3.0, "grad_norm": 1.0},
    {"kind": "validation", **LATER, "loss": 3.0},
    {"kind": "evaluation", **LATER, "results": {"sciq": {"acc": 0.5}}, "average": 0.5},
    {"kind": "samples", **LATER, "samples": [{"prompt": "a", "text": "b"}]},
    {"kind": "end", **LATER},
]
CORPUS_MANIFEST = {
    "format": FORMAT,
    "fingerprint": "0" * 32,
    "sources": ["python-stdlib"],
    "tokenizer": "tokenizer.model",
    "tokenizer_checksum": "0" * 32,
    "vocab_size": 100,
    "eos_id": 2,
    "splits": {"train": {"documents": 3, "tokens": 10, "max_token_id": 14}},
    "files": {"train.bin": {"size": 20, "blake2b": "00"}},
}


@st.composite
def _index_files(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A .idx with some numbers changed, which its sizes follow or not, then bytes; and a .bin."""
    values = {key: list(CORPUS[key]) for key in ("head", "lengths", "pointers", "documents")}
    for _ in range(draw(st.integers(0, 3))):
        numbers = values[draw(st.sampled_from(list(values)))]
        change = draw(st.sampled_from(("set", "add", "drop", "swap")))
        place = draw(st.integers(0, len(numbers) - 1)) if numbers else 0
        number = draw(
            st.one_of(
                st.integers(-3, 15), st.sampled_from([n for n in NUMBERS if isinstance(n, int)])
            )
        )
        if change == "add":
            numbers.insert(place, number)
        elif numbers and change == "set":
            numbers[place] = number
        elif numbers and change == "drop":
            del numbers[place]
        elif numbers:
            numbers[0], numbers[place] = numbers[place], numbers[0]
    if draw(st.booleans()) and len(values["head"]) == 4:
        values["head"][2:] = [len(values["lengths"]), len(values["documents"])]
    raw = _index(values)
    raw = draw(st.one_of(st.just(raw), mutated_bytes(raw), st.binary(max_size=60)))
    return raw, draw(st.one_of(st.just(BIN), mutated_bytes(BIN)))


def _index(values: dict[str, list[int]]) -> bytes:
    version, code, *counts = (*values["head"], 0, 0, 0, 0)[:4]
    head = struct.pack("<QBQQ", version % 2**64, code % 256, *(c % 2**64 for c in counts))
    parts = [CORPUS["magic"], head]
    for key, form, bits in (("lengths", "i", 32), ("pointers", "q", 64), ("documents", "q", 64)):
        wrapped = [(n + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for n in values[key]]
        parts.append(struct.pack(f"<{len(wrapped)}{form}", *wrapped))
    return b"".join(parts)


def _load_corpus(folder: Path, given: tuple[bytes, bytes]) -> None:
    for suffix, raw in zip((".idx", ".bin"), given, strict=True):
        (folder / f"corpus{suffix}").write_bytes(raw)
    corpus = IndexedCorpus(folder / "corpus")
    assert corpus.tokens[:].tobytes() == given[1]
    starts = corpus.document_starts(0, corpus.num_tokens).tolist()
    assert starts == sorted(starts) and all(0 <= s < corpus.num_tokens for s in starts)
    sequences, entries = struct.unpack_from("<QQ", given[0], 18)
    assert corpus.num_documents == entries - 1 and len(starts) <= entries
    lengths = struct.unpack_from(f"<{sequences}i", given[0], 34)
    assert sum(lengths) == corpus.num_tokens and min(lengths) >= 0


def _load_corpus_manifest(folder: Path, raw: bytes) -> None:
    (folder / NAME).write_bytes(raw)
    (folder / "train.bin").write_bytes(BIN)
    found = CorpusManifest.read(folder)
    if found is None:
        return
    found.is_complete(folder)
    try:
        verify(folder)
    except InputError as error:
        assert str(folder) in str(error)


def _lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _load_metrics(folder: Path, raw: bytes) -> None:
    path = folder / METRICS_FILE
    path.write_bytes(raw)
    records = read_metrics(path)
    with MetricsLog(folder) as log:
        assert read_metrics(path) == records
        log.truncate_after(1, 0)
        log.write("train", Counters(step=2), stage=0, loss=3.0)
    kept = read_metrics(path)
    assert kept[-1]["step"] == 2 and kept[:-1] == [r for r in records if r in kept[:-1]]
    path.write_bytes(raw)
    _report_on(load_curves(folder))


def _report_on(run: RunCurves) -> None:
    """Every number that was accepted can be compared, averaged and printed."""
    other = replace(run, growths=(), validation=Series((64,), (9.0,), (9.0,), (1.0,), (5.0,)))
    matchup = Matchup(SeedGroup((run,)), SeedGroup((other, replace(other, train=run.train))))
    tables = [run_table([run]), growth_table([run]), score_table([run]), speedup_table([matchup])]
    print_lines(Console(file=StringIO(), width=9000), map(as_markdown, tables))


def _written_lines(value: Any) -> bytes:
    return _lines(value if isinstance(value, list) else [value])


def _load_journal(folder: Path, raw: bytes) -> None:
    (folder / "shard").write_bytes(b"")
    (folder / JOURNAL_FILE).write_bytes(raw)
    with Journal(folder, COMMAND) as journal:
        assert all(isinstance(n, int) for pair in journal.done.items() for n in pair)


TARGETS = [
    Target("corpus .idx", _index_files(), _load_corpus),
    Target("corpus manifest", damaged(CORPUS_MANIFEST), _load_corpus_manifest),
    Target("metrics.jsonl", damaged(RECORDS, _written_lines), _load_metrics),
    Target("journal", damaged([COMMAND, [0, 5], [1, 7], [1, None]], _written_lines), _load_journal),
]
