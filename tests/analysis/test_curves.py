import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megagrow.analysis.curves import load_curves, smooth
from megagrow.errors import InputError

SPENT = ("tokens", "flops", "flops_true")
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


def test_a_resumed_run_is_read_with_its_changes(grown_run: Callable[..., Path]) -> None:
    """The `end` of the first part counts the time of its save, which the second part does not."""
    plain, resumed = (grown_run(name, (1, 2), 20, 1.0) for name in ("plain", "resumed"))
    path = resumed / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if '"step": 5,' in line)
    end = json.loads(lines[-1]) | {key: json.loads(lines[at])[key] for key in SPENT}
    change = {"key": "stages.0.optimizer.lr", "old": 0.1, "new": 0.2, "effect": "from now on"}
    for step, equal in ((0, True), (5, False)):
        added = end | {"kind": "config_change", "step": step, "changes": [change]}
        stopped = end | {"step": 5, "elapsed_seconds": 1e3}
        extra = [json.dumps(record) + "\n" for record in (stopped, added)]
        path.write_text("".join([*lines[: at + 1], *extra, *lines[at + 1 :]]))
        first, second = load_curves(plain), load_curves(resumed)
        assert first.train.loss and len(first.train.loss) == len(second.train.loss)
        assert first.setting is not None and second.setting is not None
        assert (first.setting.config_key == second.setting.config_key) is equal


def test_diverged_run_raises_with_its_step(make_run: Callable[..., Path]) -> None:
    directory = make_run("hot", [(10, 1000)], noise=float("nan"))
    with pytest.raises(InputError, match="train loss at step 1 is not finite"):
        load_curves(directory)
