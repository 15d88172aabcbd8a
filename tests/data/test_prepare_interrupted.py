"""Interrupted preparations go on where they were, to the same bytes."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from rich.console import Console

from megagrow.common import directory_lock
from megagrow.common.directory_lock import DirectoryLock
from megagrow.data import prepare as module
from megagrow.data import publication
from megagrow.data.manifest import CorpusManifest, verify
from megagrow.data.prepare import prepare
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.data.sources import units
from megagrow.data.tokenizers import load_tokenizer
from megagrow.errors import InputError


def _prepare(source, output, **options):
    given = {"tokenizer": "train", "vocab_size": 500, "validation_fraction": 0.1, "workers": 1}
    return prepare(
        [str(source)], output, **{**given, **options}, console=Console(file=io.StringIO())
    )


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_run_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    _prepare(source, tmp_path / "whole")
    all_units = units.find_sources([str(source)]).units
    run_tasks, seen = module.run_tasks, []

    def interrupted(start, tasks, workers):
        seen.append(len(tasks))
        yield from run_tasks(start, tasks[:8], workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_tasks", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            _prepare(source, tmp_path / "out")
    monkeypatch.setattr(module, "train_sentencepiece", None)  # It is not trained again.
    monkeypatch.setattr(module, "run_tasks", run_tasks)
    _prepare(source, tmp_path / "out", workers=2)
    assert seen == [len(all_units), len(all_units) - 8]
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_parts_of_other_options_are_discarded(source, tmp_path, monkeypatch):
    def interrupted(start, tasks, workers):
        yield from run_tasks(start, tasks[:8], workers)
        raise KeyboardInterrupt

    run_tasks = module.run_tasks
    monkeypatch.setattr(module, "run_tasks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _prepare(source, tmp_path / "out", seed=1)
    monkeypatch.setattr(module, "run_tasks", run_tasks)
    _prepare(source, tmp_path / "out", seed=2)
    _prepare(source, tmp_path / "fresh", seed=2)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["bin", "json"])
def test_a_damaged_part_is_made_again(source, tmp_path, monkeypatch, damage):
    _prepare(source, tmp_path / "whole")
    monkeypatch.setattr(module, "merge_parts", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        _prepare(source, tmp_path / "out")
    monkeypatch.undo()
    path = sorted((tmp_path / "out" / "parts").glob(f"*.{damage}"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(units, "SMALLEST_UNIT", source.stat().st_size // 20)
    monkeypatch.setattr(units, "UNITS", 1 << 40)
    _prepare(source, tmp_path / "out")
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def _interrupt(*arguments):
    raise KeyboardInterrupt


SCRIPT = """
import sys
from pathlib import Path
from megagrow.data.sources import units
from megagrow.data.prepare import prepare
if __name__ == "__main__":
    units.SMALLEST_UNIT = 200_000
    try:
        prepare([sys.argv[1]], Path(sys.argv[2]), sys.argv[3], workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_ctrl_c_leaves_no_process_and_keeps_what_is_done(tmp_path, texts, model_path, monkeypatch):
    source = tmp_path / "long.jsonl"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    source.write_text(lines * 60)
    (tmp_path / "script.py").write_text(SCRIPT)
    output, parts = tmp_path / "out", tmp_path / "out" / "parts"
    command = [sys.executable, "script.py", str(source), str(output), str(model_path)]
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not list(parts.glob("*.json")) and running.poll() is None:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    said, _ = running.communicate(timeout=30)
    assert running.returncode == 130, said
    assert "rerun the same command to resume" in said and "Traceback" not in said
    _wait_for_the_end_of_group(running.pid)
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    assert kept and not (output / "manifest.json").exists()
    monkeypatch.setattr(units, "SMALLEST_UNIT", 200_000)
    monkeypatch.setattr(module, "remove", lambda folder: None)
    options = {"tokenizer": str(model_path), "validation_fraction": 0.01, "vocab_size": None}
    _prepare(source, output, **options)
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items())
    assert (
        len(list(parts.glob("*.json"))) == len(units.find_sources([str(source)]).units) > len(kept)
    )
    assert verify(output).splits["train"].documents > 50 * len(texts)


@pytest.fixture
def two_corpora(tmp_path, model_path):
    """The preparations of two corpora with different tokenizers: functions of the folder."""
    texts = [f"{number} times {number * number}" for number in range(40)]
    other = tmp_path / "other.model"
    train_sentencepiece(["a b c d e " * 9, *texts], 280, other)

    def preparation(name, tokenizer, count, fraction):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:count]))

        def run(output):
            options = {"tokenizer": str(tokenizer), "vocab_size": None, "overwrite": True}
            return _prepare(path, output, **options, validation_fraction=fraction)

        return run

    return preparation("old", model_path, 40, 0.3), preparation("new", other, 30, 0.0)


def _killed_at(event, prepared):
    """Run `prepared` in a process that ends by itself at its event-th change of the disk after all
    documents are tokenized; False if it comes to its end before."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        return code == 9
    left, merge = iter(range(event)), module.merge_parts

    def counting(call):
        def counted(*arguments, **options):
            if next(left, None) is None:
                os._exit(9)
            return call(*arguments, **options)

        return counted

    def merged(*arguments):
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counting(getattr(os, name)))
        return merge(*arguments)

    try:
        module.merge_parts = merged
        prepared()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("replaces", [True, False])
def test_a_kill_at_any_point_leaves_the_old_corpus_or_the_new_one(tmp_path, two_corpora, replaces):
    old, new = two_corpora
    before = old(tmp_path / "old") if replaces else None
    after = new(tmp_path / "new")
    seen, event = Counter(), 0
    killed = True
    while killed:
        event += 1
        output = tmp_path / f"out{event}"
        if replaces:
            shutil.copytree(tmp_path / "old", output)
        killed = _killed_at(event, lambda output=output: new(output))
        try:
            found = CorpusManifest.read(output)
        except InputError as error:
            assert "its replacement was interrupted" in str(error)
            seen["refused"] += 1
        else:
            assert found in (before, after)
            seen["old" if found == before else "new"] += 1
            if found is None:
                assert not list(output.glob("train.*"))
            else:
                assert verify(output) == found
                tokenizer = load_tokenizer(output / found.tokenizer)
                assert tokenizer.checksum == found.tokenizer_checksum
        if event % 4 == 0 or not killed:
            assert new(output) == after
            assert _bytes(output) == _bytes(tmp_path / "new")
        shutil.rmtree(output)
    assert min(seen[name] for name in ("old", "refused", "new")) > 4, seen


def test_an_interrupted_publication_is_completed_first(tmp_path, two_corpora, monkeypatch):
    """Also by a preparation that is then refused."""
    old, new = two_corpora
    old(tmp_path / "out")
    monkeypatch.setattr(publication, "_complete", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        new(tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(InputError, match="its replacement was interrupted"):
        verify(tmp_path / "out")
    with pytest.raises(InputError, match="already exists, prepared from other sources"):
        _prepare(tmp_path / "old.jsonl", tmp_path / "out")
    new(tmp_path / "new")
    assert verify(tmp_path / "out") == verify(tmp_path / "new")
    assert not (tmp_path / "out" / "validation.bin").exists()


def test_leftovers_of_a_killed_process_are_removed(tmp_path, two_corpora):
    _, new = two_corpora
    output = tmp_path / "out"
    (output / "staged").mkdir(parents=True)
    for name in ("train.bin.17.partial", "staged/train.bin", "lock"):
        (output / name).write_bytes(bytes(100))
    new(output)
    new(tmp_path / "new")
    assert _bytes(output) == _bytes(tmp_path / "new")


def test_a_second_preparation_of_a_folder_is_refused(tmp_path, two_corpora, monkeypatch):
    _, new = two_corpora
    context = multiprocessing.get_context("fork")
    holds = context.Event()

    def hold():
        with DirectoryLock(tmp_path / "out"):
            holds.set()
            signal.pause()

    process = context.Process(target=hold)
    process.start()
    assert holds.wait(30)
    monkeypatch.setattr(directory_lock, "PATIENCE", 0.0)
    with pytest.raises(InputError, match=f"out: process {process.pid} on .* prepares this corpus"):
        new(tmp_path / "out")
    process.kill()
    process.join()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lock"]
    assert new(tmp_path / "out") == verify(tmp_path / "out")


@pytest.mark.parametrize("name", ["train.bin", "validation.idx", "manifest.json"])
def test_files_of_other_programs_are_not_overwritten(tmp_path, two_corpora, source, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(InputError, match=f"{name}: already exists, not written by megagrow prep"):
        _prepare(source, tmp_path / "out")
    assert two_corpora[1](tmp_path / "out") == verify(tmp_path / "out")


def _wait_for_the_end_of_group(group):
    """Python's own resource tracker outlives the program by a moment; nothing else may."""
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.01)
