"""Evaluation during training equals `megagrow eval` and does not change the training."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.config.schema import RunConfig
from megagrow.evaluation.lm import LMAdapter, MegagrowLM
from megagrow.evaluation.logprobs import ModelScorer
from megagrow.evaluation.online import OnlineEvaluation, StubScorer
from megagrow.evaluation.runner import evaluate
from megagrow.evaluation.stage_model import StageModel
from megagrow.evaluation.tasks import load_tasks
from megagrow.model.masks import Masks
from megagrow.reshard.fill import fill_initial
from megagrow.train import loop
from megagrow.train.stage import Stage, build_stage, masks_now
from tests.helpers.evaluation.small import (
    BATCH,
    DOCUMENTS,
    HYBRID,
    LAYOUTS,
    PIPELINES,
    SMALL,
    TASKS,
    evaluated_run,
    write_data,
)
from tests.helpers.jobs import Finished, Hook, records, train, write_run
from tests.helpers.runs import STEP_TOKENS, grow_live
from tests.helpers.spawn import run_ranks

pytestmark = pytest.mark.dist

WORLD = 2
STEPS = [2, 3, 4, 6]
"""Evaluated steps: every second one, the end of a stage, and the end of the run."""


def finished(run: RunConfig, hook: Hook | None = None) -> Finished:
    done = train(write_run(run.output_dir.with_suffix(".yaml"), run), WORLD, hook).finish()
    assert (done.codes, done.err) == ([0] * WORLD, [""] * WORLD)
    return done


def answers_into(folder: Path) -> Hook:
    """Make each rank record its answers to lm-eval's calls, except those of the preflight check."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        distribute = LMAdapter._distribute

        def recording(self: LMAdapter, *arguments: Any) -> list[Any]:
            answers = distribute(self, *arguments)
            if not isinstance(self._scorer, StubScorer):
                with (folder / f"{rank}.jsonl").open("a") as file:
                    file.write(json.dumps(answers) + "\n")
            return answers

        patch.setattr(LMAdapter, "_distribute", recording)

    return hook


def stopped_after(step: int) -> Hook:
    """Send a signal in a step, before the vote on the next one."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        vote = loop._vote

        def voting(*arguments: Any) -> Any:
            if arguments[-1] == step + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return vote(*arguments)

        patch.setattr(loop, "_vote", voting)

    return hook


def both(one: Hook, other: Hook) -> Hook:
    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        one(rank, patch)
        other(rank, patch)

    return hook


def losses(run: RunConfig) -> list[tuple[Any, ...]]:
    return records(run, "train", ("step", "tokens", "loss", "grad_norm", "lr"))


def evaluations(run: RunConfig) -> list[tuple[Any, ...]]:
    return records(run, "evaluation", ("step", "stage", "results", "average"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_data(tmp_path_factory.mktemp("tasks"))


Evaluated = tuple[RunConfig, Finished, list[list[Any]]]
"""A run that was stopped and resumed, its output before the stop, and each rank's answers."""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, data: tuple[Path, Path]) -> Evaluated:
    return evaluated(tmp_path_factory.mktemp("evaluated"), data, SMALL)


def evaluated(
    folder: Path, data: tuple[Path, Path], model: dict[str, Any], layouts: Any = LAYOUTS
) -> Evaluated:
    run = evaluated_run(folder, *data, model, layouts)
    done = finished(run, both(answers_into(folder), stopped_after(5)))
    assert records(run, "end", ["step"]) == [(5,)]
    finished(run, answers_into(folder))
    files = [folder / f"{rank}.jsonl" for rank in range(WORLD)]
    return run, done, [[json.loads(line) for line in file.open()] for file in files]


def of_checkpoints(run: RunConfig, data: Path, folder: Path) -> tuple[list[dict], list[Any]]:
    """Return the results of `megagrow eval` on the checkpoint of each step."""
    answers_into(folder)(0, pytest.MonkeyPatch())
    tasks, found = load_tasks(tuple(TASKS), data), []
    for step in STEPS:
        path = run.output_dir / "checkpoints" / f"step-{step:09d}"
        model = MegagrowLM(str(path), batch_size=BATCH)
        found.append(evaluate(model, tasks, DOCUMENTS))
    return found, [json.loads(line) for line in (folder / "0.jsonl").open()]


def flat(values: Any) -> list[Any]:
    return [inner for value in values for inner in flat(value)] if isinstance(values, list) \
        else [values]  # fmt: skip


@pytest.mark.parametrize("layouts", [LAYOUTS, PIPELINES], ids=["tensor parallel", "pipeline"])
def test_results_of_a_hybrid_are_those_of_its_checkpoints(data, tmp_path, layouts) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    check_results(evaluated(folder, data, HYBRID, layouts), data, tmp_path)


def test_results_are_those_of_the_checkpoints(case, data, tmp_path) -> None:
    check_results(case, data, tmp_path)


def check_results(case: Evaluated, data: tuple[Path, Path], tmp_path: Path) -> None:
    run, _, answered = case
    ((expected, answers),) = run_ranks(1, of_checkpoints, run, data[0], tmp_path)
    found = evaluations(run)
    assert [(step, stage) for step, stage, *_ in found] == [(2, 0), (3, 0), (4, 1), (6, 1)]
    for (_, _, results, average), right in zip(found, expected, strict=True):
        assert list(results) == TASKS and average == right["average"]
        for task in TASKS:
            assert results[task] == pytest.approx(right["results"][task], rel=1e-5)
    assert answered[0] == answered[1], "the ranks disagree"
    assert len(answered[0]) == len(STEPS) * len(TASKS)
    assert len(flat(answers)) == len(STEPS) * (2 * DOCUMENTS + 2 * 2 * DOCUMENTS + DOCUMENTS)
    assert flat(answered[0]) == pytest.approx(flat(answers), abs=1e-4, rel=1e-6)


def test_results_are_printed_on_one_line(case) -> None:
    run, done, _ = case
    output = " ".join(done.out[0].split())
    for step, _, results, average in evaluations(run)[:3]:
        accuracy = f"{results['lambada_openai']['acc']:.4g}"
        assert (
            f"step {step} | evaluation | average {average:.3f} | lambada_openai acc {accuracy}"
            in output
        )


def test_evaluation_does_not_change_training(case, data, tmp_path) -> None:
    run, *_ = case
    without = evaluated_run(tmp_path, *data, evaluation=None)
    at_end = run.stages[1].evaluation.model_copy(update={"interval": 1000})
    first, last = without.stages
    stages = [first, last.model_copy(update={"evaluation": at_end})]
    finished(without.model_copy(update={"stages": stages}))
    assert evaluations(without) == evaluations(run)[-1:], "once, at the end of the last stage"
    assert losses(run) == losses(without)


def while_masked(run: RunConfig) -> list[dict[str, Any]]:
    """Return the results of a base, and of the grown model with and without its masks."""
    evaluation = OnlineEvaluation(run, run.stages[0].evaluation, torch.device("cpu"))
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    begun: list[str] = []
    found = [evaluation(stage, None, begun.append)]
    check_decoding(stage, None)
    stage, _ = grow_live(run, stage)
    ramping = [masks_now(run, stage, step) for step in (0, 4)]
    found += [evaluation(stage, masks, begun.append) for masks in (ramping[0], None)]
    check_decoding(stage, ramping[1])
    assert begun == 3 * TASKS and stage.engine._engine.training
    return [one["results"] for one in found]


@torch.no_grad()
def check_decoding(stage: Stage, masks: Masks | None) -> None:
    """Check that cached decoding gives the tokens of passes over the complete texts.

    Under ZeRO-3 the data-parallel ranks decode different numbers of tokens.
    """
    stage.engine.train(False)
    model = StageModel(stage, masks)
    scorer = ModelScorer(model, stage.topology)
    texts = [[5, 6, 7, 8, 9], [10, 11]] if stage.topology.dp_rank == 0 else [[12]]
    cached = scorer.decode(texts)
    for _ in range(6 if stage.topology.dp_rank == 0 else 4):
        expected = scorer.decode(texts).next_tokens([None] * len(texts))
        assert cached.next_tokens([None] * len(texts)) == expected
        texts = [[*text, token] for text, token in zip(texts, expected, strict=True)]
    model.finish()
    stage.engine.train()


def masked_run(folder: Path, data: tuple[Path, Path], layouts: Any) -> RunConfig:
    run = evaluated_run(folder, *data, layouts=layouts)
    base, grown = run.stages
    wide = {"hidden_size": 44, "num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 8}
    ramp = {"operator": ["random_depth", "random_width"], "ramp_tokens": 10 * STEP_TOKENS}
    stages = [base, {**grown.model_dump(), "model": SMALL | wide | {"num_hidden_layers": 4},
                     "growth": ramp}]  # fmt: skip
    return RunConfig.model_validate(run.model_dump() | {"stages": stages})


@pytest.fixture(scope="module")
def alone(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Results of `while_masked` in one process."""
    run = masked_run(tmp_path_factory.mktemp("alone"), data, ({}, {}))
    (found,) = run_ranks(1, while_masked, run)
    return found


@pytest.mark.parametrize(
    ("world", "layouts"),
    [(2, LAYOUTS), (2, PIPELINES), (4, [LAYOUTS[1] | layout for layout in PIPELINES])],
    ids=["tensor parallel", "pipeline", "both"],
)
def test_masked_model_is_evaluated_with_its_masks(data, tmp_path, alone, world, layouts) -> None:
    """Masks start at 0, so new parameters have no effect at first."""
    run = masked_run(tmp_path, data, layouts)
    for found in run_ranks(world, while_masked, run):
        before, masked, whole = found
        for task in TASKS:
            assert masked[task] == pytest.approx(before[task], rel=1e-4)
            for one, expected in zip(found, alone, strict=True):
                assert one[task] == pytest.approx(expected[task], rel=1e-5)
        ppl = "word_perplexity"
        assert whole["wikitext"][ppl] != pytest.approx(before["wikitext"][ppl], rel=1e-2)
