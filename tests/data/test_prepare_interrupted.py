"""Interrupted preparations go on where they were, to the same bytes."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from megagrow.data import prepare as module
from megagrow.data import sources
from megagrow.data.manifest import verify
from megagrow.data.prepare import prepare


def _prepare(source, output, **options):
    given = {"tokenizer": "train", "vocab_size": 500, "validation_fraction": 0.1, "workers": 1}
    return prepare(
        [str(source)], output, **{**given, **options}, console=Console(file=io.StringIO())
    )


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_run_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    _prepare(source, tmp_path / "whole")
    all_units = sources.find_units([str(source)])
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
    monkeypatch.setattr(module, "_merge", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        _prepare(source, tmp_path / "out")
    monkeypatch.undo()
    path = sorted((tmp_path / "out" / "parts").glob(f"*.{damage}"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(sources, "SMALLEST_UNIT", source.stat().st_size // 20)
    monkeypatch.setattr(sources, "UNITS", 1 << 40)
    _prepare(source, tmp_path / "out")
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def _interrupt(*arguments):
    raise KeyboardInterrupt


SCRIPT = """
import sys
from pathlib import Path
from megagrow.data import sources
from megagrow.data.prepare import prepare
if __name__ == "__main__":
    sources.SMALLEST_UNIT = 200_000
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
    monkeypatch.setattr(sources, "SMALLEST_UNIT", 200_000)
    monkeypatch.setattr(module.shutil, "rmtree", lambda folder: None)
    options = {"tokenizer": str(model_path), "validation_fraction": 0.01, "vocab_size": None}
    _prepare(source, output, **options)
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items())
    assert len(list(parts.glob("*.json"))) == len(sources.find_units([str(source)])) > len(kept)
    assert verify(output).splits["train"].documents > 50 * len(texts)


def _wait_for_the_end_of_group(group):
    """Python's own resource tracker outlives the program by a moment; nothing else may."""
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.01)
