"""Simulated steps and growths of a dry run, next to the plan."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from megagrow.cli.app import app
from megagrow.errors import ConfigError
from megagrow.planning.dry_run import DryRun
from megagrow.planning.dry_run import dry_run as run_dry
from megagrow.planning.dry_run_tables import print_dry_run
from megagrow.planning.simulated import PlannedPeak
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run, parallel_of

WIDE = MODEL | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4000}
DEEP = WIDE | {"num_hidden_layers": 4}
WORLD, RANK = 8, 3


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DryRun:
    """Dry run of a growth from ZeRO 1 to ZeRO 2 with tensor parallelism."""
    common: dict[str, Any] = {
        "tokens": 10 * STEP_TOKENS,
        "batch": {"global_batch_size": 64, "micro_batch_size": 2},
    }
    stages = [
        common | {"model": WIDE, "parallel": parallel_of(1, 1)},
        common
        | {
            "model": DEEP,
            "parallel": parallel_of(2, 2, True),
            "growth": {"operator": "direct_depth"},
        },
    ]
    run = make_run(tmp_path_factory.mktemp("run"), stages, precision="bf16")
    return run_dry(run, WORLD, RANK, simulate=True)


def printed(result: DryRun) -> list[str]:
    out = io.StringIO()
    print_dry_run(result, Console(file=out, width=200))
    return out.getvalue().splitlines()


def test_plan_and_simulation_agree(result: DryRun) -> None:
    for index, stage in enumerate(result.simulated):
        assert stage.training.agrees, stage.training
        assert (stage.growth is None) == (index == 0)
        assert stage.growth is None or stage.growth.agrees
        assert stage.micro_batches == 2
        assert stage.report.step_waits == 1
        for key, (planned, simulated) in stage.traffic.items():
            assert planned <= simulated <= planned + 256, key  # scalars are not planned
    assert {kind for kind, _ in result.simulated[0].traffic} >= {"reduce-scatter", "all-gather"}
    assert {ranks for _, ranks in result.simulated[1].traffic} >= {2, 4}


def test_printed_next_to_the_plan(result: DryRun) -> None:
    lines = printed(result)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    for stage in result.simulated:
        sizes = (
            f"{size / 2**30:.3f}" for size in (stage.training.planned, stage.training.simulated)
        )
        assert ["peak memory of a step, GiB", *sizes] in cells
    assert ["waits of the host", "", "1"] in cells
    assert any("Stage 1: simulated step of 2 micro-batches" in line for line in lines)
    assert any("megagrow/parallel/agreement.py" in line for line in lines)
    assert not any(line.startswith("Warning: ") for line in lines)


def test_a_disagreement_is_a_warning(result: DryRun) -> None:
    first, second = result.simulated
    assert second.growth is not None
    low = dataclasses.replace(second, planned_growth=second.growth.simulated // 2)
    changed = dataclasses.replace(result, simulated=(first, low))
    (warning,) = [line for line in printed(changed) if line.startswith("Warning: ")]
    assert "stages.1: planned memory of the growth is" in warning and "10%" in warning


def test_a_peak_agrees_within_ten_percent_or_up_to_a_bound() -> None:
    agrees = [PlannedPeak(planned, 100).agrees for planned in (89, 90, 110, 111)]
    assert agrees == [False, True, True, False]
    assert PlannedPeak(200, 100, bound=True).agrees
    assert not PlannedPeak(89, 100, bound=True).agrees


def test_a_dry_run_simulates_only_on_request(tmp_path: Path) -> None:
    assert run_dry(make_run(tmp_path, [{"tokens": STEP_TOKENS}]), 2).simulated == ()
    command = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--simulate"])
    assert isinstance(command.exception, ConfigError)
    assert str(command.exception) == "--simulate needs --dry-run"
