"""Inputs that cannot be evaluated: every rank exits with code 2, and one error line is printed."""

import json
import signal
import sys
from pathlib import Path

import lm_eval.api.task
import lm_eval.tasks
import pytest

import megagrow.evaluation.online
import megagrow.evaluation.tasks
from megagrow.evaluation import runner
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.evaluation.small import evaluated_run, write_data
from tests.helpers.hugging_face import hugging_face, state_of, tiny
from tests.helpers.jobs import Job, write_run
from tests.helpers.reshard.models import layout_of
from tests.helpers.run.refusals import refused, refused_run

pytestmark = pytest.mark.dist

MODEL = tiny(vocab_size=301, num_key_value_heads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a tokenizer, a folder without data, and a checkpoint without a tokenizer."""
    folder = tmp_path_factory.mktemp("bad")
    write_data(folder)
    state = state_of(hugging_face(MODEL), parameter_plan(MODEL, 1))
    write_checkpoint(folder / "step-5", MODEL, layout_of(MODEL, 1, 1, 1), state)
    (folder / "none").mkdir()
    return folder


CASES = {
    "no tokenizer": (
        1,
        "step-5 --data-dir data --tasks piqa",
        "step-5: the source names no tokenizer",
    ),
    "a missing tokenizer": (
        2,
        "step-5 --data-dir data --tasks piqa --tokenizer nowhere.model",
        "nowhere.model: no such tokenizer file",
    ),
    "an unknown task": (
        2,
        "step-5 --data-dir data --tasks piqa,nope",
        "task nope cannot be read from local files; available: gstack, lambada_openai,",
    ),
    "no task": (1, "step-5 --data-dir data --tasks ,", "--tasks: empty"),
    "no data folder": (2, "step-5 --data-dir nowhere --tasks piqa", "nowhere: no such directory"),
    "no data file": (
        2,
        "step-5 --data-dir none --tasks logiqa",
        "none: no data of task logiqa; expected logiqa/Test.txt, logiqa/*.jsonl or .parquet",
    ),
    "ranks": (2, "step-5 --tp 3", "--tp 3 does not divide the world size 2"),
    "heads": (
        2,
        "step-5 --data-dir data --tasks piqa --tokenizer tokenizer.model --tp 2",
        "--tp 2 does not divide the model's num_key_value_heads = 1",
    ),
    "no checkpoint": (2, "nowhere --data-dir data --tasks piqa", "nowhere: no such directory"),
    "an unknown precision": (
        1,
        "step-5 --data-dir data --tasks piqa --tokenizer tokenizer.model --dtype fp8",
        "dtype fp8: must be one of float32, bfloat16",
    ),
    "no place for the results": (
        2,
        "step-5 --data-dir data --tasks piqa --tokenizer tokenizer.model --output data",
        "data: cannot be written",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_invalid_arguments(folder, tmp_path, monkeypatch, name) -> None:
    world, words, message = CASES[name]
    monkeypatch.chdir(folder)
    assert message in refused(tmp_path, ["eval", *words.split()], world)


def test_a_continuation_that_is_too_long_stops_all_ranks(folder, tmp_path) -> None:
    """Only one of the two ranks has the request."""
    docs = [{"goal": "a", "sol1": "b", "sol2": "c", "label": 0} for _ in range(4)]
    docs[3]["sol2"] = "z" * 100
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "a.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    words = ["--data-dir", str(tmp_path), "--tasks", "piqa"]
    words += ["--tokenizer", str(folder / "tokenizer.model")]
    error = refused(tmp_path / "out", ["eval", str(folder / "step-5"), *words])
    assert "a continuation has 10" in error
    assert "tokens, but the context length of the model is 64" in error


def without_lm_eval(rank: int, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "lm_eval", None)


def offline(rank: int, patch: pytest.MonkeyPatch) -> None:
    """Make the hub unreachable and load one folder of lm-eval's tasks, as loading all is slow."""
    task_folder = Path(lm_eval.tasks.__file__).parent / "sciq"
    manager = megagrow.evaluation.tasks.TaskManager

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'allenai/sciq' on the Hub (a reason)\nand more")

    patch.setattr(lm_eval.api.task.datasets, "load_dataset", unreachable)
    patch.setattr(
        megagrow.evaluation.tasks,
        "TaskManager",
        lambda include_path: manager(
            include_defaults=False, include_path=[include_path, str(task_folder)]
        ),
    )


OFF = {
    "nope": "task nope: lm-eval has no task of this name; see lm-eval ls tasks",
    "sciq": "tasks sciq: cannot load data from the hub: Couldn't reach 'allenai/sciq' on the Hub "
    "(a reason); set data_dir to use local files",
}


@pytest.mark.parametrize("task", OFF)
def test_tasks_that_the_hub_does_not_provide(folder, tmp_path, task) -> None:
    words = ["eval", str(folder / "step-5"), "--tasks", task]
    assert refused(tmp_path, words, hook=offline) == OFF[task]


NEEDED = "evaluation needs lm-eval: pip install megagrow[eval]"


def test_without_lm_eval(folder, tmp_path) -> None:
    assert refused(tmp_path, ["eval", str(folder / "step-5")], hook=without_lm_eval) == NEEDED


RUNS = {
    "no tokenizer": (["data.tokenizer=null"], "evaluation needs a tokenizer; set data.token"),
    "an unknown key": (["evaluation.step=2"], "unknown key 'evaluation.step'; "),
    "no tasks": (["evaluation.tasks=[]"], "'evaluation.tasks' = []"),
    "no data folder": (["evaluation.data_dir=nowhere"], "nowhere: no such directory"),
    "no data": (["evaluation.tasks=[arc_easy]"], "no data of task arc_easy; expected arc_easy/"),
    "a request that is too long": (
        [f"stages.{i}.model.max_position_embeddings=16" for i in range(2)]
        + ["data.sequence_length=16"],
        "tokens, but the context length of the model is 16",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_cannot_be_evaluated_does_not_start(folder, tmp_path, name) -> None:
    overrides, message = RUNS[name]
    run = evaluated_run(tmp_path, folder / "data", folder / "tokenizer.model")
    assert message in refused_run(write_run(tmp_path / "run.yaml", run), *overrides)
    assert not run.output_dir.exists()


def test_a_run_that_needs_lm_eval_does_not_start(folder, tmp_path) -> None:
    run = evaluated_run(tmp_path, folder / "data", folder / "tokenizer.model")
    assert refused_run(write_run(tmp_path / "run.yaml", run), hook=without_lm_eval) == NEEDED
    assert not run.output_dir.exists()


def test_a_killed_rank_is_named(folder, tmp_path, monkeypatch) -> None:
    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        if rank == 1:
            patch.setattr(runner, "evaluate_checkpoint", lambda *_, **__: signal.raise_signal(9))

    monkeypatch.chdir(folder)
    words = "eval step-5 --data-dir data --tasks piqa --tokenizer tokenizer.model"
    done = Job(tmp_path, 2, words.split(), hook).finish()
    assert done.codes == [5, -signal.SIGKILL], done.err
    assert done.err[0].startswith("error: rank 1 exited or was killed (last heartbeat: ")
    assert done.err[0].count("\n") == 1
