"""The demo: its two runs are a fair comparison, and read what its script prepares."""

import re
from pathlib import Path

import pytest

from megagrow.config.load import load_run
from megagrow.config.stage_length import stage_tokens
from megagrow.model.layers.flops import paper_flops_per_token

ROOT = Path(__file__).resolve().parents[1]


def runs():
    return [load_run(ROOT / "configs" / "demo" / f"{name}.yaml") for name in ("gstack", "scratch")]


def test_all_runs_cost_the_same_flops_the_base_charged_in_full() -> None:
    late = load_run(ROOT / "configs" / "demo" / "late.yaml")
    grown, scratch, grown_late = (
        sum(stage_tokens(stage) * paper_flops_per_token(stage.model) for stage in run.stages)
        for run in (*runs(), late)
    )
    assert grown == pytest.approx(scratch, rel=2e-3)
    assert grown_late == pytest.approx(scratch, rel=3e-3)


def test_only_the_growth_differs() -> None:
    grown, scratch = runs()
    (target,) = scratch.stages
    for stage in grown.stages:
        for part in ("parallel", "batch", "optimizer", "schedule"):
            assert getattr(stage, part) == getattr(target, part), part
    assert grown.stages[-1].model == target.model
    assert grown.stages[0].model.num_hidden_layers * 4 == target.model.num_hidden_layers
    assert (grown.data, grown.seed) == (scratch.data, scratch.seed)


def test_the_script_prepares_what_the_runs_read() -> None:
    script = (ROOT / "launchers" / "demo.sh").read_text(encoding="utf-8")
    for run in runs():
        assert f"--vocab-size {run.stages[0].model.vocab_size}" in script
        output = re.search(r"--output (\S+)", script)
        assert output and run.stages[0].data.train[0].path == Path(output[1]) / "train"
