"""A run whose growth is learned: what it is charged, and a kill in the middle of the learning."""

import os
import signal
from pathlib import Path

import pytest

import megagrow.train.growth_event.ligo_trainer
from megagrow.config.schema import RunConfig
from tests.helpers.jobs import Hook, records, train, write_run
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run

pytestmark = [pytest.mark.dist, pytest.mark.slow]

BEFORE, LEARN, AFTER = 4, 6, 4
WIDE = MODEL | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
COUNTERS = ("step", "tokens", "flops", "flops_true", "stage")


def learned_run(folder: Path) -> RunConfig:
    parallel = {"zero_stage": 2, "tensor_model_parallel_size": 2}
    growth = {
        "operator": "learn_width",
        "learn": {"steps": LEARN, "lr": 1e-2, "warmup_steps": 1},
    }
    later = {"model": WIDE, "tokens": AFTER * STEP_TOKENS, "parallel": parallel, "growth": growth}
    return make_run(folder, [{"tokens": BEFORE * STEP_TOKENS, "parallel": parallel}, later])


def end_of(run: RunConfig, hook: Hook | None = None) -> list[int]:
    run.output_dir.parent.mkdir(exist_ok=True)
    job = train(write_run(run.output_dir.with_suffix(".yaml"), run), 2, hook)
    return job.finish().codes


def history(run: RunConfig) -> tuple[list, list]:
    steps = records(run, "train", (*COUNTERS, "loss", "grad_norm"))
    growths = records(run, "growth", (*COUNTERS, "learning_losses", "loss_before", "loss_after"))
    return steps, growths


def signalled_while_it_learns(number: signal.Signals, ranks: tuple[int, ...]) -> Hook:
    """Send a signal to these ranks in the middle of the learning."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        step, steps = megagrow.train.growth_event.ligo_trainer.summed_gradients, []

        def watched(*arguments):
            steps.append(step(*arguments))
            if len(steps) == LEARN // 2 and rank in ranks:
                os.kill(os.getpid(), number)
            return steps[-1]

        patch.setattr(megagrow.train.growth_event.ligo_trainer, "summed_gradients", watched)

    return hook


def test_a_learned_growth_is_charged_and_survives_a_kill(tmp_path):
    undisturbed = learned_run(tmp_path)
    assert end_of(undisturbed) == [0, 0]
    steps, ((step, tokens, flops, flops_true, stage, losses, *_),) = history(undisturbed)
    assert (step, stage) == (BEFORE, 1) and tokens == (BEFORE + LEARN) * STEP_TOKENS
    assert losses[1] < losses[0]
    # The stages' own tokens are all trained on, behind those that the growth took.
    assert [s[1] // STEP_TOKENS for s in steps] == [1, 2, 3, 4, 11, 12, 13, 14]
    assert flops > steps[BEFORE - 1][2] and flops_true > steps[BEFORE - 1][3]

    killed = undisturbed.model_copy(update={"output_dir": tmp_path / "again" / "run"})
    kill = signalled_while_it_learns(signal.SIGKILL, (0, 1))
    assert end_of(killed, kill) == [-signal.SIGKILL] * 2
    assert len(history(killed)[0]) == BEFORE and not history(killed)[1]
    assert end_of(killed) == [0, 0]
    assert history(killed) == history(undisturbed)


def test_a_stop_in_a_learned_growth_leaves_without_the_growth(tmp_path):
    undisturbed = learned_run(tmp_path)
    assert end_of(undisturbed) == [0, 0]
    stopped = undisturbed.model_copy(update={"output_dir": tmp_path / "again" / "run"})
    assert end_of(stopped, signalled_while_it_learns(signal.SIGUSR1, (1,))) == [0, 0]
    assert records(stopped, "end", ["step"]) == [(BEFORE,)]
    assert len(history(stopped)[0]) == BEFORE and not history(stopped)[1]
    assert end_of(stopped) == [0, 0]
    assert history(stopped) == history(undisturbed)
