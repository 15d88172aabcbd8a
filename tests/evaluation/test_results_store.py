"""Results of `megagrow eval` on a run's checkpoints appear in the run's report."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from megagrow.analysis.curves import load_curves
from megagrow.config.schema import RunConfig
from megagrow.errors import InputError
from megagrow.evaluation.results_store import (
    find_run,
    remove_stored_after,
    run_counters,
    store_results,
)
from megagrow.evaluation.runner import average
from megagrow.train.reporting.metrics import read_metrics
from tests.helpers.evaluation.small import SMALL, write_data
from tests.helpers.jobs import Job, train, write_run
from tests.helpers.logs import captured_logs
from tests.helpers.runs import STEP_TOKENS, make_run


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, list[str]]:
    """A run of four steps with its checkpoints on another disk, and the arguments of its
    evaluation."""
    folder, disk = tmp_path_factory.mktemp("kept"), tmp_path_factory.mktemp("disk")
    (folder / "run").mkdir()
    (folder / "run" / "checkpoints").symlink_to(disk)
    data, tokenizer = write_data(folder)
    stage = {"model": SMALL, "tokens": 4 * STEP_TOKENS}
    run = make_run(folder, [stage], checkpoint={"interval": 2, "keep_last": 4})
    assert train(write_run(folder / "run.yaml", run), 1).finish().codes == [0]
    words = ["--data-dir", str(data), "--tokenizer", str(tokenizer), "--limit", "3"]
    return run, words


def evaluated(folder: Path, path: Path, words: list[str], *more: str) -> list[str]:
    done = Job(folder, 1, ["eval", str(path), *words, *more]).finish()
    assert (done.codes, done.err) == ([0], [""])
    return done.out


@pytest.mark.dist
def test_results_of_checkpoints_are_scores_of_the_run(case, tmp_path) -> None:
    run, words = case
    folder, output = run.output_dir, tmp_path / "found.json"
    early = folder / "checkpoints" / "step-000000002"
    evaluated(tmp_path, early, words, "--tasks", "piqa", "--no-keep", "--output", str(output))
    assert not (folder / "evaluations").exists()
    evaluated(tmp_path, early, words, "--tasks", "piqa")
    path = folder / "evaluations" / "step-000000002.json"
    assert path.read_text() == output.read_text()
    (said,) = evaluated(tmp_path, folder, words, "--tasks", "wikitext")
    assert str(folder / "evaluations" / "step-000000004.json") in said
    (at,) = [r for r in read_metrics(folder / "metrics.jsonl")
             if r["kind"] == "train" and r["step"] == 2]  # fmt: skip
    first, last = load_curves(folder).scores
    assert (first.step, first.tokens, first.flops) == (2, at["tokens"], at["flops"])
    assert first.seconds == at["elapsed_seconds"]
    assert (last.step, last.tokens, last.average) == (4, 4 * STEP_TOKENS, None)
    found = json.loads(output.read_text())
    assert found["results"]["piqa"] == first.results["piqa"] and found["limit"] == 3
    assert (
        0 <= first.average == found["average"] <= 1
        and "word_perplexity" in last.results["wikitext"]
    )


@pytest.mark.dist
def test_json_is_alone_on_the_output_of_rank_0(case, tmp_path) -> None:
    run, words = case
    path, output = run.output_dir / "checkpoints" / "step-000000002", tmp_path / "found.json"
    more = ["--tasks", "piqa", "--no-keep"]
    done = Job(
        tmp_path, 2, ["eval", str(path), *words, *more, "--output", str(output), "--json"]
    ).finish()
    assert done.codes == [0, 0] and done.out[1] == ""
    assert json.loads(done.out[0]) == json.loads(output.read_text())
    (table,) = evaluated(tmp_path, path, words, *more)
    for metric, value in json.loads(done.out[0])["results"]["piqa"].items():
        assert "stderr" in metric or re.search(rf"{metric} +\| +{value:.4f}", table)


def results(task: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    counters = {"step": 7, "tokens": 70, "flops": 7.0, "elapsed_seconds": 1.5, "limit": None}
    scores = {"results": {task: {"acc": accuracy}}, "average": accuracy}
    return {"checkpoint": "x", **counters, **scores, **changes}


def test_results_of_one_checkpoint_are_merged(tmp_path: Path) -> None:
    store_results(results("piqa", 0.5), tmp_path, average)
    store_results(results("piqa", 0.75), tmp_path, average)
    path = store_results(results("sciq", 0.25), tmp_path, average)
    both = json.loads(path.read_text())
    assert both["results"] == {"piqa": {"acc": 0.75}, "sciq": {"acc": 0.25}}
    assert both["average"] == 0.5
    for other in ({"limit": 10}, {"elapsed_seconds": 2.5}):
        store_results(results("piqa", 1.0, **other), tmp_path, average)
        assert json.loads(path.read_text()) == results("piqa", 1.0, **other)
    endless = results("wikitext", 0.0, results={"wikitext": {"word_perplexity": float("inf")}})
    store_results(endless, tmp_path, average)
    assert json.loads(path.read_text())["results"] == {"wikitext": {"word_perplexity": None}}


def test_results_that_cannot_be_removed_are_named(tmp_path: Path) -> None:
    (tmp_path / "evaluations" / "step-000000005.json").mkdir(parents=True)
    stored = store_results(results("piqa", 0.5, step=7), tmp_path, average)
    with captured_logs() as messages:
        remove_stored_after(tmp_path, 4)
    (line,) = messages
    assert "step-000000005.json: cannot be removed (Is a directory)" in line
    assert not stored.exists()


@pytest.mark.dist
def test_results_of_discarded_steps_are_removed(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"tokens": 4 * STEP_TOKENS}], checkpoint={"interval": 2})
    path, checkpoints = write_run(tmp_path / "run.yaml", run), run.output_dir / "checkpoints"
    assert train(path, 1).finish().codes == [0]
    files = [
        store_results(results("piqa", 0.5, step=step), run.output_dir, average) for step in (2, 4)
    ]
    for step, left in ((4, [True, True]), (2, [True, False]), (0, [False, False])):
        for newer in checkpoints.iterdir():
            if newer.name > f"step-{step:09d}":
                shutil.rmtree(newer)
        assert train(path, 1).finish().codes == [0]
        assert [file.exists() for file in files] == left


def test_run_is_found_only_for_its_own_checkpoints(case, tmp_path: Path) -> None:
    run, _ = case
    own = run.output_dir / "checkpoints" / "step-000000002"
    assert find_run(own) == run.output_dir.resolve()
    for path in (run.output_dir, tmp_path / "checkpoints" / own.name, tmp_path):
        path.mkdir(parents=True, exist_ok=True)
        assert find_run(path) is None
    assert run_counters(None) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must contain a JSON object"),
        ("{}", "not in the format of megagrow eval"),
        (json.dumps(results("a", 0.5, results={"a": 3})), "not in the format of megagrow eval"),
        (json.dumps(results("a", 0.5, tokens="70")), "not in the format of megagrow eval"),
    ],
)
def test_damaged_result_file_raises(case, text: str, message: str) -> None:
    run, _ = case
    path = run.output_dir / "evaluations" / "step-000000009.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(InputError, match=f"step-000000009.json: {message}"):
        load_curves(run.output_dir)
    path.unlink()
