"""What cannot be evaluated: every rank leaves with exit code 2, and all together say one line."""

import json
import sys
from pathlib import Path

import lm_eval.api.task
import lm_eval.tasks
import pytest

import megagrow.evaluation.online
import megagrow.evaluation.tasks
from megagrow.parallel.sharding import parameter_plan
from tests.formats.test_hugging_face import state_of
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.evaluation.small import evaluated_run, write_data
from tests.helpers.hugging_face import hugging_face, tiny
from tests.helpers.jobs import write_run
from tests.helpers.reshard.models import layout_of
from tests.helpers.run.refusals import refused, refused_run

pytestmark = pytest.mark.dist

MODEL = tiny(vocab_size=301, num_key_value_heads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and tokenizer, a folder without data, and a checkpoint without a tokenizer."""
    folder = tmp_path_factory.mktemp("bad")
    write_data(folder)
    state = state_of(hugging_face(MODEL), parameter_plan(MODEL, 1))
    write_checkpoint(folder / "step-5", MODEL, layout_of(MODEL, 1, 1, 1), state)
    (folder / "none").mkdir()
    return folder


CASES = {
    "no tokenizer": (1, "step-5 --data-dir data --tasks piqa", "step-5: names no tokenizer"),
    "a missing tokenizer": (
        2,
        "step-5 --data-dir data --tasks piqa --tokenizer nowhere.model",
        "nowhere.model: no such tokenizer file",
    ),
    "an unknown task": (
        2,
        "step-5 --data-dir data --tasks piqa,nope",
        "task nope: from local files there are gstack, lambada_openai,",
    ),
    "no task": (1, "step-5 --data-dir data --tasks ,", "--tasks: empty"),
    "no data folder": (2, "step-5 --data-dir nowhere --tasks piqa", "nowhere: no such directory"),
    "no data file": (
        2,
        "step-5 --data-dir none --tasks logiqa",
        "none: no data of logiqa; should hold logiqa/Test.txt, logiqa/*.jsonl or .parquet",
    ),
    "ranks": (2, "step-5 --tp 3", "--tp 3 does not divide the 2 ranks of this start"),
    "heads": (
        2,
        "step-5 --data-dir data --tasks piqa --tokenizer tokenizer.model --tp 2",
        "--tp 2 does not divide the model's num_key_value_heads 1",
    ),
    "no checkpoint": (2, "nowhere --data-dir data --tasks piqa", "nowhere: no such directory"),
    "an unknown precision": (
        1,
        "step-5 --data-dir data --tasks piqa --tokenizer tokenizer.model --dtype fp8",
        "dtype fp8: should be one of float32, bfloat16",
    ),
    "no place for the results": (
        2,
        "step-5 --data-dir data --tasks piqa --tokenizer tokenizer.model --output data",
        "data: cannot be written",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_evaluated(folder, tmp_path, monkeypatch, name) -> None:
    world, words, said = CASES[name]
    monkeypatch.chdir(folder)
    found = refused(tmp_path, ["eval", *words.split()], world)
    assert said in found


def test_a_continuation_that_is_too_long_stops_all_ranks(folder, tmp_path) -> None:
    """One of two ranks has it."""
    docs = [{"goal": "a", "sol1": "b", "sol2": "c", "label": 0} for _ in range(4)]
    docs[3]["sol2"] = "z" * 100
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "a.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    words = ["--data-dir", str(tmp_path), "--tasks", "piqa"]
    words += ["--tokenizer", str(folder / "tokenizer.model")]
    found = refused(tmp_path / "out", ["eval", str(folder / "step-5"), *words])
    assert "a continuation of 10" in found and "tokens: the model reads 64" in found


def without_lm_eval(rank: int, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "lm_eval", None)


def offline(rank: int, patch: pytest.MonkeyPatch) -> None:
    """A hub that is not reached, and of lm-eval's tasks one folder: to read all takes seconds."""
    known = Path(lm_eval.tasks.__file__).parent / "sciq"
    manager = megagrow.evaluation.tasks.TaskManager

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'allenai/sciq' on the Hub (a reason)\nand more")

    patch.setattr(lm_eval.api.task.datasets, "load_dataset", unreachable)
    patch.setattr(
        megagrow.evaluation.tasks,
        "TaskManager",
        lambda include_path: manager(
            include_defaults=False, include_path=[include_path, str(known)]
        ),
    )


OFF = {
    "nope": "task nope: lm-eval knows none of this name; see lm-eval ls tasks",
    "sciq": "tasks sciq: no data from the hub: Couldn't reach 'allenai/sciq' on the Hub (a reason)"
    "; local files need none (data_dir)",
}


@pytest.mark.parametrize("task", OFF)
def test_what_the_hub_has_not(folder, tmp_path, task) -> None:
    words = ["eval", str(folder / "step-5"), "--tasks", task]
    assert refused(tmp_path, words, hook=offline) == OFF[task]


NEEDED = "evaluation needs lm-eval: pip install megagrow[eval]"


def test_without_lm_eval(folder, tmp_path) -> None:
    assert refused(tmp_path, ["eval", str(folder / "step-5")], hook=without_lm_eval) == NEEDED


RUNS = {
    "no tokenizer": (["data.tokenizer=null"], "evaluation turns texts into tokens: set data.token"),
    "an unknown key": (["evaluation.step=2"], "unknown key 'evaluation.step'; "),
    "no tasks": (["evaluation.tasks=[]"], "'evaluation.tasks' = []"),
    "no data folder": (["evaluation.data_dir=nowhere"], "nowhere: no such directory"),
    "no data": (["evaluation.tasks=[arc_easy]"], "no data of arc_easy; should hold arc_easy/"),
    "a task that asks too much": (
        [f"stages.{i}.model.max_position_embeddings=16" for i in range(2)]
        + ["data.sequence_length=16"],
        "tokens: the model reads 16",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_cannot_be_evaluated_is_not_begun(folder, tmp_path, name) -> None:
    overrides, said = RUNS[name]
    run = evaluated_run(tmp_path, folder / "data", folder / "tokenizer.model")
    found = refused_run(write_run(tmp_path / "run.yaml", run), *overrides)
    assert said in found
    assert not run.output_dir.exists()


def test_a_run_that_needs_lm_eval_is_not_begun(folder, tmp_path) -> None:
    run = evaluated_run(tmp_path, folder / "data", folder / "tokenizer.model")
    assert refused_run(write_run(tmp_path / "run.yaml", run), hook=without_lm_eval) == NEEDED
    assert not run.output_dir.exists()
