"""Time, energy, CO2 and price by hand; a pace that was measured; options that make no sense."""

from pathlib import Path

import pytest

from megagrow.common.gpu_specs import find_gpu
from megagrow.config.load import load_run
from megagrow.config.schema import RunConfig
from megagrow.errors import InputError
from megagrow.planning.cost_tables import cost_columns, cost_lines, cost_rows
from megagrow.planning.costs import RunCosts, pace_of
from megagrow.planning.request import PlanRequest, plan_request
from megagrow.train.reporting.metrics import Counters, MetricsLog, StepMetrics, train_fields

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOKENS = (4_769 * 2**21, 46_492 * 2**21)


def paper_run() -> RunConfig:
    return load_run(CONFIGS / "gstack-1.1b.yaml")


def costs_of(**request: object) -> RunCosts:
    asked = PlanRequest(**{"world": 8, **request})  # type: ignore[arg-type]
    costs = plan_request(paper_run(), asked).costs
    assert costs is not None
    return costs


def true_flops(layers: int) -> int:
    """Per token of a model of the paper's 1.1B family: matrices of a layer, the head, attention."""
    layer = 4 * 2048 * 2048 + 3 * 2048 * 5632
    return 6 * (layers * layer + 32000 * 2048) + 6 * layers * 2048 * 2049


def test_costs_by_hand() -> None:
    costs = costs_of(gpu="h100", mfu=0.4, price=2.0)
    seconds = [
        TOKENS[i] * true_flops(layers) / (0.4 * 989e12 * 8) for i, layers in enumerate((6, 24))
    ]
    for found, expected, tokens in zip(costs.stages, seconds, TOKENS, strict=True):
        hours = 8 * expected / 3600
        assert found.seconds == pytest.approx(expected)
        assert found.tokens_per_second == pytest.approx(tokens / expected)
        assert found.gpu_hours == pytest.approx(hours)
        assert found.kwh == pytest.approx(hours * 0.7 * 1.2)
        assert found.co2_kg == pytest.approx(hours * 0.7 * 1.2 * 0.48)
        assert found.price == pytest.approx(hours * 2)
    assert costs.total.seconds == pytest.approx(sum(seconds))
    assert costs.total.tokens == sum(TOKENS)


def test_scratch_stands_beside_grown() -> None:
    """The paper's 41% and 55% on the target's tokens and a quarter of the base's."""
    costs = costs_of(gpu="h100", mfu=0.5)
    assert costs.scratch is not None
    counted = TOKENS[1] + TOKENS[0] * 308_307_968 / 1_233_225_728
    for found, speedup in zip(costs.scratch, (1.41, 1.55), strict=True):
        assert found.tokens == pytest.approx(counted * speedup)
        assert found.tokens_per_second == pytest.approx(0.5 * 989e12 * 8 / true_flops(24))
    columns, rows = cost_columns(costs), cost_rows(costs)
    assert columns == ["stage 0", "stage 1", "total", "scratch at +41%", "scratch at +55%"]
    assert "price" not in rows and all(len(cells) == 5 for cells in rows.values())


def test_factors_that_are_given_hold() -> None:
    given = costs_of(gpu="h100", mfu=0.4, watts=500.0, pue=1.1, co2=0.05)
    own = costs_of(gpu="h100", mfu=0.4)
    assert given.total.kwh is not None and own.total.kwh is not None
    assert given.total.kwh / own.total.kwh == pytest.approx(500 * 1.1 / (700 * 1.2))
    assert given.total.co2_kg == pytest.approx(given.total.kwh * 0.05)
    assert "assumed" not in " ".join(cost_lines(given))
    assert " ".join(cost_lines(own)).count("assumed") == 2


def test_energy_is_not_made_up() -> None:
    costs = costs_of(gpu="gb200", mfu=0.4)
    assert costs.total.kwh is None and "energy, kWh" not in cost_rows(costs)
    assert "Energy: unknown; pass the power of a GPU with --watts." in cost_lines(costs)


def measured_run(directory: Path, seconds: list[float], peak: float | None) -> Path:
    """A run of steps that took so long: 1000 tokens of 6e6 FLOPs each, in two stages."""
    counters = Counters()
    with MetricsLog(directory) as log:
        for index, taken in enumerate(seconds):
            seen = StepMetrics(
                stage=index // 4, loss=1.0, lr=1e-3, grad_norm=1.0, tokens=1000, flops=5e9,
                flops_true=6e9, seconds=taken, memory_bytes=1, position=counters.tokens,
            )  # fmt: skip
            counters = counters.after_step(seen)
            log.write("train", counters, **train_fields(seen, peak))
    return directory


SECONDS = [9.0, 0.5, 0.25, 1.0, 9.0, 2.0, 0.5, 0.5]
"""Without the first of each stage: a median of 0.5."""


def test_a_measured_mfu_is_taken_to_other_gpus(tmp_path: Path) -> None:
    """6e9 FLOPs in half a second are 3% of 4e11."""
    directory = measured_run(tmp_path, SECONDS, peak=4e11)
    pace = pace_of(None, directory, find_gpu("h100"), 8)
    assert pace is not None
    assert pace.flops_per_second == pytest.approx(0.03 * 989e12 * 8)
    assert "MFU 3.0%, the median of 6 steps" in pace.source


def test_where_no_mfu_was_known_flops_are_taken(tmp_path: Path) -> None:
    directory = measured_run(tmp_path, SECONDS, peak=None)
    pace = pace_of(None, directory, None, 4)
    assert pace is not None
    assert pace.flops_per_second == pytest.approx(12e9)
    assert "assuming as many ranks" in pace.source


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"gpu": "h1000"}, "--gpu h1000: not known; use one of h100-pcie, h100-nvl, h100, "),
        ({"mfu": 0.4}, "name the GPU with --gpu"),
        ({"gpu": "h100", "mfu": 40.0}, "--mfu 40.0: should be more than 0 and at most 1"),
        ({"gpu": "h100", "mfu": 0.4, "measured": Path("x")}, "use one of them"),
        ({"measured": Path("nowhere")}, "nowhere/metrics.jsonl: no such file"),
        ({"gpu": "h100", "watts": 300.0}, "--watts requires --mfu, --measured or --cluster"),
        ({"gpu": "h100", "price": 2.0}, "--price requires --mfu, --measured or --cluster"),
        ({"gpu": "h100", "mfu": 0.4, "pue": 0.9}, "--pue 0.9: should be 1 or more"),
        ({"gpu": "h100", "mfu": 0.4, "price": float("nan")}, "--price nan: should be"),
        ({"gpu_memory": "much"}, "--gpu-memory much: should be a number of bytes"),
    ],
)
def test_bad_options_are_one_line(request_: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_request(paper_run(), PlanRequest(**request_))  # type: ignore[arg-type]
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_of_one_step_tells_no_pace(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no stage has two train records"):
        pace_of(None, measured_run(tmp_path, [1.0], None), None, 1)


def test_a_card_has_the_figures_of_its_row() -> None:
    card = find_gpu("h100-nvl")
    assert (card.name, card.peak_flops, card.memory, card.watts) == (
        "H100 NVL", 835e12, 94 * 10**9, 400,
    )  # fmt: skip
