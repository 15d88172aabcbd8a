"""Summary of `megagrow plan`: memory, time and cost, one line each."""

from pathlib import Path

import pytest

from megagrow.config.load import load_run
from megagrow.planning.cost_tables import cost_rows
from megagrow.planning.request import PlanRequest, plan_request
from megagrow.planning.tables import summary_lines

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("request_", "lines"),
    [
        (
            PlanRequest(world=8, gpu="h100", mfu=0.4, price=2.0),
            (
                "fits: 43.1 of 74.5 GiB (stage 1, rank 0)",
                "time: 3d01h (403.8k tokens/s, MFU 40.0% as given)",
                "cost: 591.6 GPU-hours, 497.0 kWh, price 1,183.27, 107.5B tokens, 8.24e+20 FLOPs",
            ),
        ),
        (
            PlanRequest(world=8, gpu_memory="45GiB"),
            (
                "fits barely: 43.1 of 45.0 GiB (stage 1, rank 0); driver, NCCL and fragmentation "
                "take about 8% of the memory",
                "time: unknown; pass --cluster, or --gpu and --mfu",
                "cost: 107.5B tokens, 8.24e+20 FLOPs",
            ),
        ),
        (PlanRequest(world=8, gpu_memory="40GB"), ("does not fit: 43.1 of 37.3 GiB (stage 1, ",)),
        (PlanRequest(world=8), ("memory: 43.1 GiB per rank (stage 1, rank 0); pass --gpu to ",)),
    ],
)
def test_the_summary_states_memory_time_and_cost(
    request_: PlanRequest, lines: tuple[str, ...]
) -> None:
    run = load_run(CONFIGS / "gstack-1.1b.yaml")
    shown = summary_lines(plan_request(run, request_))
    assert all(line.startswith(start) for line, start in zip(shown, lines, strict=False))


def test_a_small_run_takes_seconds_and_its_growth_the_most_memory() -> None:
    run = load_run(CONFIGS / "demo" / "gstack.yaml")
    result = plan_request(run, PlanRequest(gpu="a100", mfu=0.0002))
    memory, time, cost = summary_lines(result)
    growth = result.plan.stages[1].growth
    assert growth is not None and result.costs is not None
    assert (result.plan.peak.rank, result.plan.peak.size) == (None, growth.peak_bytes)
    assert memory.startswith("fits: 0.1 of 74.5 GiB (growth before stage 1)")
    assert time.startswith("time: 2m09s (") and cost.startswith("cost: 0.036 GPU-hours, ")
    assert round(result.costs.total.seconds) == 129
    assert cost_rows(result.costs)["time"][2] == "2m09s"
