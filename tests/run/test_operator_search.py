"""A run that tries several operators: the best is kept, all are charged, and a resume knows it."""

import os
import signal
from pathlib import Path

import pytest

import megagrow.run
from megagrow.config.schema import RunConfig
from megagrow.model.layers.flops import paper_flops_per_token
from tests.helpers.jobs import records, train, write_run
from tests.helpers.run.refusals import refused_run
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run

pytestmark = pytest.mark.dist

BEFORE, TRIED, AFTER = 4, 3, 4
CANDIDATES = ["direct_depth", "zero_depth", "random_depth"]
DEEP = MODEL | {"num_hidden_layers": 4}


def probing_run(folder: Path) -> RunConfig:
    growth = {"probe": {"operators": CANDIDATES, "steps": TRIED}, "lr_schedule": "continue"}
    later = {"model": DEEP, "tokens": AFTER * STEP_TOKENS, "growth": growth}
    # A kill soon after the growth must find a checkpoint behind it, and not one half written.
    checkpoint = {"interval": 2, "background": False}
    return make_run(folder, [{"tokens": BEFORE * STEP_TOKENS}, later], checkpoint=checkpoint)


def end_of(run: RunConfig, hook=None) -> tuple[list[int], str]:
    run.output_dir.parent.mkdir(exist_ok=True)
    done = train(write_run(run.output_dir.with_suffix(".yaml"), run), 2, hook).finish()
    assert done.err == ["", ""] or hook, done.err
    return done.codes, "".join(done.out)


def killed_two_steps_after_the_growth(rank: int, patch: pytest.MonkeyPatch) -> None:
    advance, saved = megagrow.run.advance, []

    def watched(*arguments):
        event = advance(*arguments)
        saved.append(event)
        if event.state.stage == 1 and event.state.stage_tokens == 3 * STEP_TOKENS:
            os.kill(os.getpid(), signal.SIGKILL)
        return event

    patch.setattr(megagrow.run, "advance", watched)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[RunConfig, str]:
    run = probing_run(tmp_path_factory.mktemp("probe"))
    codes, said = end_of(run)
    assert codes == [0, 0]
    return run, said


def test_the_best_is_kept_and_all_are_charged(undisturbed):
    run, said = undisturbed
    ((operator, tokens, flops),) = records(run, "growth", ("operator", "tokens", "flops"))
    losses = {}
    for line in said.splitlines():
        if " | probe " in line:
            words = line.split()
            losses[words[words.index("probe") + 1]] = float(words[words.index("after") - 1])
    assert list(losses) == CANDIDATES
    assert len(set(losses.values())) == len(CANDIDATES), "the choice would prove nothing"
    assert operator == min(losses, key=losses.get)
    # Tokens are trained on again, FLOPs are spent: on the base, and on every candidate.
    assert tokens == BEFORE * STEP_TOKENS
    base, target = (paper_flops_per_token(stage.model) for stage in run.stages)
    assert flops == pytest.approx(STEP_TOKENS * (BEFORE * base + len(CANDIDATES) * TRIED * target))


def test_the_run_is_that_of_the_best_alone(undisturbed, tmp_path):
    run, _ = undisturbed
    ((operator,),) = records(run, "growth", ("operator",))
    growth = {"operator": operator, "lr_schedule": "continue"}
    later = run.stages[1].model_dump() | {"growth": growth}
    alone = make_run(tmp_path, [run.stages[0].model_dump(), later])
    assert end_of(alone)[0] == [0, 0]
    values = ("step", "tokens", "loss", "grad_norm")
    assert records(alone, "train", values) == records(run, "train", values)


def test_a_pipeline_chooses_the_same(undisturbed, tmp_path):
    run, _ = undisturbed
    pipeline = {"pipeline_model_parallel_size": 2}
    stages = [stage.model_dump() | {"parallel": pipeline} for stage in run.stages]
    same = make_run(tmp_path, stages)
    assert end_of(same)[0] == [0, 0]
    for kind, value in (("growth", "loss_before"), ("growth", "loss_after"), ("train", "loss")):
        expected, found = (sum(records(each, kind, [value]), ()) for each in (run, same))
        assert found == pytest.approx(expected, abs=1e-5)
    assert records(run, "growth", ["operator"]) == records(same, "growth", ["operator"])


def test_a_resumed_run_knows_what_was_chosen(undisturbed, tmp_path):
    run, _ = undisturbed
    again = run.model_copy(update={"output_dir": tmp_path / "again" / "run"})
    assert end_of(again, killed_two_steps_after_the_growth)[0] == [-signal.SIGKILL] * 2
    codes, said = end_of(again)
    assert codes == [0, 0] and "probe:" not in said
    values = ("step", "tokens", "flops", "loss", "grad_norm")
    assert records(again, "train", values) == records(run, "train", values)


def test_another_operator_than_the_run_has_grown_by_is_refused(undisturbed):
    run, _ = undisturbed
    said = refused_run(
        run.output_dir.with_suffix(".yaml"),
        "stages.1.growth.probe=null",
        "stages.1.growth.operator=llama_pro",
    )
    assert (
        "does not fit the run: stages.1.growth.operator: ['direct_depth'] -> ['llama_pro']" in said
    )
