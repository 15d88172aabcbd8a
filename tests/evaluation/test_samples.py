"""Samples at validations: equal under every layout, recorded, and without effect on training."""

from pathlib import Path

import pytest
import torch

from megagrow.config.schema import RunConfig
from megagrow.errors import ConfigError, DataError
from megagrow.evaluation.completion import read_prompts
from megagrow.evaluation.samples import TrainingSamples
from megagrow.planning.dry_run import dry_run
from megagrow.reshard.fill import fill_initial
from megagrow.train.stage import build_stage
from tests.helpers.evaluation.small import evaluated_run, write_data
from tests.helpers.jobs import records, train, write_run
from tests.helpers.runs import parallel_of
from tests.helpers.spawn import run_ranks

WORLD = 2
PROMPTS = ["abde", "iklno rst", ""]
PIPELINE = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    1: [parallel_of(0, 1)],
    2: [
        *(parallel_of(zero, 1) for zero in (0, 1, 3)),
        parallel_of(1, 2),
        parallel_of(3, 1) | {"context_parallel_size": 2},
        PIPELINE,
    ],
    4: [PIPELINE, parallel_of(1, 2, sequence_parallel=True) | PIPELINE],
}
"""By the number of ranks."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_data(tmp_path_factory.mktemp("tasks"))


def sampled_run(
    folder: Path, data: tuple[Path, Path], prompts: object, temperature: float = 0.8, **options: int
) -> RunConfig:
    folder.mkdir(exist_ok=True)
    samples = {"prompts": prompts, "max_tokens": 8, "temperature": temperature} | options
    run = evaluated_run(folder, *data, evaluation=None, validation={"interval": 2})
    return RunConfig.model_validate(run.model_dump() | {"samples": samples})


def texts(run: RunConfig) -> list[list[dict[str, str]]]:
    """Return the samples of new weights in each layout, twice."""
    found = []
    for layout in LAYOUTS[torch.distributed.get_world_size()]:
        base = run.stages[0].model_dump() | {"parallel": layout}
        changed = RunConfig.model_validate(run.model_dump() | {"stages": [base]})
        samples = TrainingSamples(changed, changed.samples)
        stage = build_stage(changed, 0, torch.device("cpu"))
        fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
        stage.engine.ready(0)
        found += [samples(stage, None), samples(stage, None)]
        stage.release()
    return found


@pytest.mark.dist
@pytest.mark.parametrize(("temperature", "worlds"), [(0.0, [2]), (0.8, [2, 4])])
def test_samples_are_equal_in_every_layout(
    tmp_path: Path, data: tuple[Path, Path], temperature: float, worlds: list[int]
) -> None:
    run = sampled_run(tmp_path, data, PROMPTS, temperature)
    (single,) = run_ranks(1, texts, run)
    for world in worlds:
        for found in run_ranks(world, texts, run):
            assert len(found) == 2 * len(LAYOUTS[world])
            assert all(each == single[0] for each in found)
    assert [sample["prompt"] for sample in single[0]] == PROMPTS
    assert any(sample["text"] for sample in single[0])


@pytest.mark.dist
def test_samples_and_validation_sets_are_recorded_and_do_not_change_training(
    tmp_path: Path, data: tuple[Path, Path]
) -> None:
    losses, validations = [], []
    for name in ("with", "without"):
        run = sampled_run(tmp_path / name, data, PROMPTS, interval=4)
        sets = {"web": run.data.validation["validation"], "code": run.stages[0].data.train}
        if name == "without":
            run, sets = run.model_copy(update={"samples": None}), {"validation": sets["code"]}
        run = run.model_copy(update={"data": run.data.model_copy(update={"validation": sets})})
        done = train(write_run(tmp_path / f"{name}.yaml", run), WORLD).finish()
        assert (done.codes, done.err) == ([0] * WORLD, [""] * WORLD)
        losses.append(records(run, "train", ("step", "loss", "grad_norm")))
        fields = ("loss", "losses") if name == "with" else ("loss",)
        validations.append(records(run, "validation", fields))
        found = records(run, "samples", ("step", "samples"))
        assert [step for step, _ in found] == ([3, 4, 6] if name == "with" else [])
        shown = [line for line in done.out[0].splitlines() if " | sample | " in line]
        assert len(shown) == len(PROMPTS) * len(found)
        for _, samples in found:
            assert [sample["prompt"] for sample in samples] == PROMPTS
    assert losses[0] == losses[1]
    assert [list(by_set) for _, by_set in validations[0]] == [["web", "code"]] * 4
    assert [(loss, by_set["web"]) for loss, by_set in validations[0]] == [
        (by_set["web"], by_set["web"]) for _, by_set in validations[0]
    ]
    assert [(by_set["code"],) for _, by_set in validations[0]] == validations[1]
    assert all(by_set["web"] != by_set["code"] for _, by_set in validations[0])


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo words\n", encoding="utf-8")
    assert read_prompts(path) == ["one", "two words"]
    for content, problem in ((b"\n", "no prompts"), (b"\xff", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=problem):
            read_prompts(path)
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "missing.txt")


def opened(run: RunConfig) -> str:
    try:
        TrainingSamples(run, run.samples)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_a_prompt_that_fills_the_context_is_refused(
    tmp_path: Path, data: tuple[Path, Path]
) -> None:
    run = sampled_run(tmp_path, data, ["kino " * 200])
    for message in run_ranks(WORLD, opened, run):
        assert "shorten the prompt" in message and "'kino kino" in message


def test_a_dry_run_reads_the_prompts(tmp_path: Path, data: tuple[Path, Path]) -> None:
    file = tmp_path / "prompts.txt"
    run = sampled_run(tmp_path, data, file)
    assert dry_run(run, WORLD).problems == (f"{file}: No such file or directory",)
    file.write_text("kino " * 200)
    (problem,) = dry_run(run, WORLD).problems
    assert "shorten the prompt" in problem
    file.write_text("kino")
    assert dry_run(run, WORLD).problems == ()


def test_samples_need_a_tokenizer(tmp_path: Path, data: tuple[Path, Path]) -> None:
    from megagrow.config.validation import problems

    run = sampled_run(tmp_path, data, PROMPTS)
    without = run.model_copy(update={"data": run.data.model_copy(update={"tokenizer": None})})
    assert problems(run) == []
    assert problems(without) == ["samples needs a tokenizer; set data.tokenizer or remove samples"]
