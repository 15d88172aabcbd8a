from collections.abc import Callable
from pathlib import Path

import pytest

from megagrow.analysis.curves import load_curves, smooth
from megagrow.errors import InputError

TOKENS = 1000
"""Tokens per step of the test runs."""


def record(tokens: int, loss: float, stage: int = 0) -> dict[str, float]:
    spent = {"flops": 6.0 * tokens, "flops_true": 7.0 * tokens, "elapsed_seconds": 0.5 * tokens}
    return {"tokens": tokens, **spent, "loss": loss, "stage": stage}


def test_run_is_read_back(make_run: Callable[..., Path]) -> None:
    run = load_curves(make_run("grown", [(20, 1000), (30, 4000, 1e8)]))
    spent = 6.0 * TOKENS * (20 * 1000 + 30 * 4000)
    assert (run.name, run.seed, run.parameters) == ("grown", 1, (1000, 4000))
    assert (run.tokens, run.flops) == (50 * TOKENS, pytest.approx(spent))
    assert run.seconds == pytest.approx(50 * 0.5 + 2.0)
    (growth,) = run.growths
    assert (growth.stage, growth.tokens) == (1, 20 * TOKENS)
    assert growth.flops == pytest.approx(6.0 * TOKENS * 20 * 1000)
    assert run.validation.tokens == tuple(TOKENS * step for step in (10, 20, 30, 40, 50))
    assert run.validation.loss[-1] == pytest.approx(1.5 + 6.0 * ((spent + 1e8) / 1e9) ** -0.3)
    assert len(run.train.loss) == 50


def test_smoothing_is_the_mean_over_the_last_share_of_tokens() -> None:
    records = [record(10 * at, loss) for at, loss in enumerate((4.0, 2.0, 6.0, 1.0), start=1)]
    series = smooth(records, run_tokens=40, share=0.5)
    assert series.loss == pytest.approx((4.0, 3.0, 4.0, 3.5))
    assert series.tokens == (10, 20, 30, 40)
    assert series.flops_true == (70.0, 140.0, 210.0, 280.0)
    assert series.seconds == (5.0, 10.0, 15.0, 20.0)


def test_smoothing_never_crosses_a_growth() -> None:
    records = [record(10, 4.0), record(20, 2.0), record(30, 9.0, 1), record(40, 5.0, 1)]
    assert smooth(records, run_tokens=40, share=1.0).loss == pytest.approx((4.0, 3.0, 9.0, 7.0))


def test_missing_run_raises(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/metrics\.jsonl: no such file"):
        load_curves(tmp_path / "nowhere")


def test_unfinished_run_raises(make_run: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="half: the run is not finished"):
        load_curves(make_run("half", [(10, 1000)], end=False))


def test_interrupted_run_raises(make_run: Callable[..., Path]) -> None:
    """A stopped run also has an `end` record, before its last step."""
    path = make_run("stopped", [(10, 1000)]) / "metrics.jsonl"
    path.write_text(path.read_text().replace('"run_steps": 10', '"run_steps": 20'))
    with pytest.raises(InputError, match="stopped: the run is not finished"):
        load_curves(path.parent)


def test_diverged_run_raises_with_its_step(make_run: Callable[..., Path]) -> None:
    directory = make_run("hot", [(10, 1000)], noise=float("nan"))
    with pytest.raises(InputError, match="train loss at step 1 is not finite"):
        load_curves(directory)
