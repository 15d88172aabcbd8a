"""TensorBoard and W&B: the curves that they show, texts, and runs that resume or rewind."""

import logging
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagrow.config.schema import RunConfig
from megagrow.errors import ResourceError
from megagrow.train.reporting.metrics import Counters, MetricsLog, read_metrics, train_fields
from megagrow.train.reporting.trackers import open_trackers
from megagrow.train.reporting.writers import CURVES, TensorBoardTracker, curves
from tests.helpers.runs import STEP_TOKENS, make_run
from tests.helpers.train.fake_wandb import Wandb
from tests.helpers.train.records import measure, train

SAMPLES = [{"prompt": "def main(", "text": "):\n    <b>x</b>\n\n# end"}]
GROWTH = {"operator": "direct_depth", "loss_before": 3.0, "loss_after": 3.5, "seconds": 1.0}


def open_log(directory: Path) -> MetricsLog:
    log = MetricsLog(directory)
    log.attach([TensorBoardTracker(directory)])
    return log


def events(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory / "tensorboard")).Reload()


def shown(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every event that TensorBoard shows, by scalar."""
    found = events(directory)
    tags = found.Tags()["scalars"]
    series = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags}
    return {tag: values for tag, values in series.items() if values}


def assert_shown(directory: Path) -> None:
    """TensorBoard shows the curves of metrics.jsonl, in order."""
    right: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(directory / "metrics.jsonl"):
        for tag, value in curves(record).items():
            right.setdefault(tag, []).append((record["step"], value))
    found = shown(directory)
    assert found.keys() == right.keys() and "train/loss" in right
    for tag, points in right.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        values = [value for _, value in points]
        assert [value for _, value in found[tag]] == pytest.approx(values), tag


def undone(log: MetricsLog, counters: Counters, step: int, stage: int = 0) -> None:
    """Records that do not stay."""
    train(log, counters, step, stage)
    log.write("evaluation", counters, stage=stage + 1, average=99.0)


@pytest.mark.parametrize("clock", [0, -86400 * 365], ids=["clock", "clock set back"])
@pytest.mark.parametrize("restarts", [False, True], ids=["rewind", "resume"])
def test_tensorboard_shows_what_metrics_have(
    tmp_path: Path, restarts: bool, clock: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path)
    log.truncate_after(-1)
    kept = train(log, Counters(), 3)
    log.write("checkpoint", kept, stage=0)
    undone(log, kept, 7)
    now = time.time() + clock
    monkeypatch.setattr(time, "time", lambda: now)
    if restarts:
        log = open_log(tmp_path)
    log.truncate_after(3, stage=0)
    again = train(log, kept, 5)
    assert_shown(tmp_path)
    undone(log, again, 9)
    log.truncate_after(5, stage=0)
    log.truncate_after(3, stage=0)
    train(log, kept, 6)
    assert_shown(tmp_path)
    assert [step for step, _ in shown(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5, 6]


def write_each_kind(log: MetricsLog) -> None:
    seen = measure(0, z_loss=0.25)
    counters = Counters().after_step(seen)
    log.write("start", Counters(), name="run", seed=1)
    log.write("train", counters, **train_fields(seen, 8e4))
    log.write("validation", counters, stage=0, loss=2.5, losses={"web": 2.5, "code": 1.5})
    results = {"piqa": {"acc": 0.5}, "wikitext": {"word_perplexity": None}}
    log.write("evaluation", counters, stage=0, results=results, average=0.5)
    log.write("samples", counters, stage=0, samples=SAMPLES)
    log.write("checkpoint", counters, stage=0, path="step-1", seconds=2.0)
    log.write("growth", counters, stage=1, **GROWTH)


SHOWN = {
    *(f"train/{field}" for field in CURVES["train"]),
    *("validation/loss", "evaluation/results/piqa/acc", "evaluation/average"),
    *("validation/losses/web", "validation/losses/code"),
    *("growth/loss_before", "growth/loss_after"),
}


def test_tensorboard_has_few_curves_and_the_texts(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        write_each_kind(log)
    assert shown(tmp_path).keys() == SHOWN
    found = events(tmp_path)
    texts = {tag: found.Tensors(tag)[0] for tag in found.Tags()["tensors"]}
    assert {tag: event.step for tag, event in texts.items()} == {
        "samples/0": 1,
        "growth/operator": 1,
    }
    (sample,) = texts["samples/0"].tensor_proto.string_val
    assert sample.decode() == "    def main():\n        <b>x</b>\n    \n    # end\n"
    assert found.SummaryMetadata("samples/0").plugin_data.plugin_name == "text"


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def wandb_run(folder: Path, project: str = "project") -> RunConfig:
    settings = {"wandb_project": project, "wandb_group": "sweep", "wandb_tags": ["a", "b"]}
    stage = {"tokens": STEP_TOKENS}
    run = make_run(folder, [stage], logging=settings | {"tensorboard": False})
    run.output_dir.mkdir(exist_ok=True)
    return run


def wandb_log(run: RunConfig) -> MetricsLog:
    log = MetricsLog(run.output_dir)
    log.attach(open_trackers(run))
    return log


def losses(wandb: Wandb) -> list[int]:
    """Return the steps of the training losses of the only W&B run."""
    (history,) = wandb.history.values()
    return [step for step, row in history.items() if "train/loss" in row]


def test_wandb_has_config_group_tags_curves_and_samples(tmp_path: Path, wandb: Wandb) -> None:
    run = wandb_run(tmp_path)
    with wandb_log(run) as log:
        write_each_kind(log)
    (settings,) = wandb.settings
    assert settings == {
        "project": "project",
        "name": run.name,
        "group": "sweep",
        "tags": ["a", "b"],
        "config": run.model_dump(mode="json"),
    }
    ((identity, history),) = wandb.history.items()
    assert identity == (run.output_dir / "wandb.id").read_text()
    assert history.keys() == {1} and wandb.finished == 1
    table = history[1].pop("samples")
    assert table.columns == ["step", "prompt", "text"]
    assert table.data == [[1, SAMPLES[0]["prompt"], SAMPLES[0]["text"]]]
    assert history[1].keys() == SHOWN | {"tokens", "flops", "elapsed_seconds"}


def test_wandb_continues_a_run_that_was_stopped(tmp_path: Path, wandb: Wandb) -> None:
    run = wandb_run(tmp_path)
    with wandb_log(run) as log:
        log.truncate_after(-1)
        stopped = train(log, Counters(), 3)
    with wandb_log(run) as log:
        log.truncate_after(3, stage=0)
        log.write("start", stopped)
        train(log, stopped, 5)
    assert losses(wandb) == [1, 2, 3, 4, 5] and wandb.finished == 2


@pytest.mark.parametrize("restarts", [False, True], ids=["rewind", "resume"])
@pytest.mark.parametrize("rewinds", [True, False])
def test_wandb_forgets_undone_steps_if_it_can(
    tmp_path: Path,
    wandb: Wandb,
    restarts: bool,
    rewinds: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, wandb.rewinds = wandb_run(tmp_path), rewinds
    log = wandb_log(run)
    log.truncate_after(-1)
    kept = train(log, Counters(), 3)
    train(log, kept, 6)
    if restarts:
        log = wandb_log(run)
    (history,) = wandb.history.values()
    history[4]["train/loss"] = -1.0
    with caplog.at_level(logging.WARNING, "megagrow"):
        log.truncate_after(3, stage=0)
        train(log, kept, 8)
    assert losses(wandb) == [1, 2, 3, 4, 5, 6, 7, 8]
    (history,) = wandb.history.values()
    assert (history[4]["train/loss"] > 0) is rewinds
    assert ("keeps the records up to step 6" in caplog.text) is not rewinds


def test_a_run_that_starts_anew_is_another_wandb_run(tmp_path: Path, wandb: Wandb) -> None:
    run = wandb_run(tmp_path)
    train(wandb_log(run), Counters(), 3)
    log = wandb_log(run)
    log.truncate_after(-1)
    train(log, Counters(), 2)
    assert [sorted(history) for history in wandb.history.values()] == [[1, 2, 3], [1, 2]]


def test_wandb_that_cannot_start_is_one_line(
    tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourceError, match=r"wandb_project: W&B cannot start: no API key"):
        open_trackers(wandb_run(tmp_path, "refused"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ResourceError, match="wandb is missing: pip install"):
        open_trackers(wandb_run(tmp_path))


def test_trackers_are_those_of_the_run_file(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"tokens": STEP_TOKENS}])
    assert open_trackers(run) == []
    shows = run.model_copy(update={"logging": run.logging.model_copy(update={"tensorboard": True})})
    (tracker,) = open_trackers(shows)
    assert isinstance(tracker, TensorBoardTracker)
