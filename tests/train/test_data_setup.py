"""Tokenizers, identities on all hosts, and epochs of the corpora of a run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megagrow.common.sizes import format_short
from megagrow.config.schema import RunConfig
from megagrow.data import stage_streams
from megagrow.data.indexed import IndexedCorpus
from megagrow.data.manifest import CorpusManifest, Split, corpus_files
from megagrow.data.tokenizers import gives_same_ids, load_tokenizer
from megagrow.errors import InputError
from megagrow.formats.hugging_face_tokenizer import tokenizer_files
from megagrow.planning.dry_run import dry_run
from megagrow.planning.request import PlanRequest, plan_request
from megagrow.train import data_setup
from megagrow.train.data_setup import open_inputs
from tests.helpers.alpaca import VOCAB, tokenizer
from tests.helpers.runs import STEP_TOKENS, make_run, write_corpus


def describe(prefix: Path, checksum: str, largest: int = 100) -> Path:
    """Write a manifest of one corpus."""
    corpus = IndexedCorpus(prefix)
    paths = [prefix.with_suffix(suffix) for suffix in (".bin", ".idx")]
    split = Split(documents=corpus.num_documents, tokens=corpus.num_tokens, max_token_id=largest)
    (prefix.parent / "tokenizer.model").write_text(checksum)
    CorpusManifest(
        fingerprint="",
        sources=[],
        tokenizer="tokenizer.model",
        tokenizer_checksum=checksum,
        vocab_size=101,
        eos_id=2,
        splits={prefix.name: split},
        files=corpus_files(prefix.parent, paths),
    ).write(prefix.parent)
    return prefix


def corpora(tmp: Path, **checksums: str | None) -> list[dict[str, Any]]:
    """Corpora by the checksums of their tokenizers; None writes no manifest."""
    made = []
    for name, checksum in checksums.items():
        (tmp / name).mkdir(exist_ok=True)
        prefix = write_corpus(tmp / name / "train", documents=5)
        made.append({"path": prefix if checksum is None else describe(prefix, checksum)})
    return made


def run_of(tmp: Path, tokens: int = STEP_TOKENS, **data: Any) -> RunConfig:
    made = make_run(tmp, [{"tokens": tokens}])
    train = {"sequence_length": 16, "train": data.pop("train")}
    values = made.model_dump() | {"data": data}
    values["stages"][0]["data"] = train
    return RunConfig.model_validate(values)


def problems(run: RunConfig) -> tuple[str, ...]:
    """The message of `open_inputs`, which the dry run reports as well."""
    told = dry_run(run, 1).problems
    if told:
        with pytest.raises(InputError) as caught:
            open_inputs(run)
        assert str(caught.value) in told
    return told


def test_corpora_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    a, b, c = corpora(tmp_path, a="1" * 32, b="2" * 32, c="1" * 32)
    assert problems(run_of(tmp_path, train=[a, c], validation=[c])) == ()
    for data in ({"train": [a, b]}, {"train": [a, c], "validation": [b]}):
        (told,) = problems(run_of(tmp_path, **data))
        assert told.startswith(f"{b['path']}: another tokenizer (checksum 222222222222) than ")
        assert f"than {a['path']} (111111111111); " in told and "data.tokenizer" in told


def test_data_tokenizer_must_be_that_of_the_corpora(tmp_path: Path) -> None:
    path = tokenizer(tmp_path)
    own = load_tokenizer(path).checksum
    a, b, foreign = corpora(tmp_path, a=own, b="2" * 32, foreign=None)
    model = {"vocab_size": 500}

    def run(corpus: dict[str, Any]) -> RunConfig:
        made = run_of(tmp_path, train=[corpus], tokenizer=path)
        values = made.model_dump()
        values["stages"][0]["model"] |= model
        return RunConfig.model_validate(values)

    assert problems(run(a)) == problems(run(foreign)) == ()
    (told,) = problems(run(b))
    assert told.startswith(f"data.tokenizer = {path}: another tokenizer (checksum {own[:12]}) than")


def test_other_forms_of_one_tokenizer_are_accepted(tmp_path: Path) -> None:
    """A checksum is that of a file's content; the ids decide."""
    path = tokenizer(tmp_path)
    made = tokenizer_files(path, vocab_size=VOCAB).documents
    (tmp_path / "json").mkdir()
    for name, document in made.items():
        (tmp_path / "json" / name).write_text(json.dumps(document))
    own, other = (load_tokenizer(each) for each in (path, tmp_path / "json/tokenizer.json"))
    assert own.checksum != other.checksum and gives_same_ids(own, other)
    (corpus,) = corpora(tmp_path, a=own.checksum)
    shutil.copy(path, tmp_path / "a" / "tokenizer.model")
    run = run_of(tmp_path, train=[corpus], tokenizer=tmp_path / "json/tokenizer.json")
    values = run.model_dump()
    values["stages"][0]["model"] |= {"vocab_size": VOCAB}
    assert problems(RunConfig.model_validate(values)) == ()
    assert open_inputs(RunConfig.model_validate(values)).contents.tokenizer == own.checksum
    changed = made["tokenizer.json"] | {"normalizer": {"type": "Lowercase"}}
    (tmp_path / "json/tokenizer.json").write_text(json.dumps(changed))
    (told,) = problems(RunConfig.model_validate(values))
    assert "another tokenizer" in told


def test_an_unknown_tokenizer_is_accepted_with_one_warning(tmp_path: Path) -> None:
    made = corpora(tmp_path, a="1" * 32, b=None, c=None, d=None, e=None)
    (line,) = open_inputs(run_of(tmp_path, train=made)).warnings
    named = ", ".join(str(corpus["path"]) for corpus in made[1:4])
    assert line.startswith(f"{named} and 1 more: no tokenizer is recorded")
    assert open_inputs(run_of(tmp_path, train=made[:1])).warnings == ()
    assert open_inputs(run_of(tmp_path, train=made[1:2])).warnings == ()


def test_a_corpus_replaced_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest is read before the replacement, its files after it."""
    run, opened = run_of(tmp_path, train=corpora(tmp_path, a="1" * 32)), stage_streams.open_stream

    def opening(*arguments: Any, **options: Any) -> Any:
        corpora(tmp_path, a="2" * 32)
        return opened(*arguments, **options)

    monkeypatch.setattr(stage_streams, "open_stream", opening)
    with pytest.raises(InputError, match="was replaced while it was opened; start the run again"):
        open_inputs(run)


def test_hosts_with_different_corpora_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run_of(tmp_path, train=corpora(tmp_path, a="1" * 32, b="1" * 32))
    path = str(made.stages[0].data.train[1].path)

    def gather(of_third: Callable[[Any], Any]) -> Callable[[list[Any], Any], None]:
        def fill(gathered: list[Any], own: Any) -> None:
            gathered[:] = [own, own, own | {path: of_third(own[path])}]

        return fill

    monkeypatch.setattr(data_setup, "run_on_all_ranks", lambda action: action())
    monkeypatch.setattr(data_setup.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(data_setup.dist, "all_gather_object", gather(lambda own: own))
    assert data_setup.open_inputs_on_all_ranks(made).train is not None
    other = gather(lambda own: replace(own, content="sampled:0"))
    monkeypatch.setattr(data_setup.dist, "all_gather_object", other)
    with pytest.raises(InputError, match=rf"{path}: the corpus of rank 2 differs from that of"):
        data_setup.open_inputs_on_all_ranks(made)


def test_epochs_in_plan_dry_run_and_at_the_start(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    for prefix, documents in ((small, 3), (large, 60)):
        write_corpus(prefix, documents=documents)
    sizes = [IndexedCorpus(prefix).num_tokens for prefix in (small, large)]
    tokens = 5 * 4 * sizes[0] // STEP_TOKENS * STEP_TOKENS
    blend = [{"path": small, "weight": 1}, {"path": large, "weight": 3}]
    run = run_of(tmp_path, tokens, train=blend)
    epochs = [tokens / 4 / sizes[0], tokens * 3 / 4 / sizes[1]]
    assert epochs[0] > 4.5 and epochs[1] < 1
    lines = [
        f"corpus {prefix} | {format_short(size)} tokens | {n:.2f} epochs"
        for prefix, size, n in zip((small, large), sizes, epochs, strict=True)
    ]
    inputs = open_inputs(run)
    assert [each.line() for each in inputs.epochs] == lines
    warning = f"{small}: read for {epochs[0]:.1f} epochs; repeated tokens lose their value beyond"
    assert inputs.warnings[1].startswith(warning)
    assert [note for note in dry_run(run, 1).notes if note.startswith("corpus ")] == lines
    planned = plan_request(run, PlanRequest(world=1)).data
    assert list(planned[:2]) == lines and planned[2].startswith(f"Warning: {warning}")
    small.with_suffix(".bin").unlink()
    (planned,) = plan_request(run, PlanRequest(world=1)).data
    assert planned.startswith(f"Epochs of the corpora: unknown, {small}.bin: No such file")
