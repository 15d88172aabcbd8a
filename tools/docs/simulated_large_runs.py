"""Write the tables of pipelines and long sequences of docs/reference/simulated-memory.md.

python tools/docs/simulated_large_runs.py          simulate the ranks, update the page
python tools/docs/simulated_large_runs.py --check  exit with code 1 if the page is out of date

Both exit with code 1 if planned memory is off by more than 10%. A rank takes 2 to 5 minutes.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megagrow.common.sizes import format_in  # noqa: E402
from megagrow.common.tables import markdown_table  # noqa: E402
from megagrow.config.load import load_run  # noqa: E402
from megagrow.planning.simulated import SimulatedStage, simulate_run  # noqa: E402
from megagrow.simulation.rank import Actions  # noqa: E402
from tools.docs.generated_page import write_or_check  # noqa: E402

PAGE = ROOT / "docs/reference/simulated-memory.md"
BEGIN = "<!-- tables: tools/docs/simulated_large_runs.py -->"
END = "<!-- end of the tables of large runs -->"

PEAK_COLUMNS = (
    *("run file", "stage", "rank", "PP rank", "layout", "checkpointing", "micro-batches"),
    *("planned, GiB", "simulated, GiB", "error"),
)
TRAFFIC_COLUMNS = (
    "run file",
    "stage",
    "rank",
    "operation",
    "ranks",
    "planned, GB",
    "simulated, GB",
)

SCALARS = 1000
"""Bytes of norms, losses and flags in a step, at most; they are not planned."""


class SimulatedRank(NamedTuple):
    """Rank of a run file of configs/large/."""

    name: str
    world_size: int
    rank: int
    micro_batches: int
    """Micro-batches of the step, per pipeline rank."""


RANKS = (
    SimulatedRank("context-8b", 64, 0, 1),
    SimulatedRank("gstack-70b", 512, 0, 2),
    SimulatedRank("gstack-70b", 512, 511, 2),
)
"""Context-parallel ranks do equal work; of a pipeline the first and the last rank."""

Stages = dict[SimulatedRank, tuple[SimulatedStage, ...]]
Cells = Callable[[SimulatedStage], Iterator[list[str]]]


def simulate(each: SimulatedRank) -> tuple[SimulatedStage, ...]:
    """Simulate all stages of a rank."""
    run = load_run(ROOT / "configs" / "large" / f"{each.name}.yaml")
    actions = Actions(micro_batches=each.micro_batches)
    return simulate_run(run, each.world_size, each.rank, actions)


def with_tables(page: str, simulated: Stages) -> str:
    """Return the page with up-to-date tables."""
    before, rest = page.split(BEGIN)
    peaks = markdown_table(PEAK_COLUMNS, _rows(simulated, _peak_cells))
    traffic = markdown_table(TRAFFIC_COLUMNS, _rows(simulated, _traffic_cells))
    return f"{before}{BEGIN}\n\n{peaks}\n\n{traffic}\n\n{END}{rest.split(END)[1]}"


def _rows(simulated: Stages, cells: Cells) -> Iterator[list[str]]:
    for each, stages in simulated.items():
        for index, stage in enumerate(stages):
            for row in cells(stage):
                yield [f"`{each.name}`", f"{index}", f"{each.rank}", *row]


def _peak_cells(stage: SimulatedStage) -> Iterator[list[str]]:
    peak, memory = stage.training, stage.memory
    parallel = memory.stage.parallel
    yield [
        f"{memory.pp_rank}",
        parallel.layout_text(memory.layout.world_size),
        parallel.activation_checkpointing,
        f"{stage.micro_batches}",
        format_in(peak.planned, "GiB", 1),
        format_in(peak.simulated, "GiB", 1),
        f"{peak.ratio - 1:+.1%}",
    ]


def _traffic_cells(stage: SimulatedStage) -> Iterator[list[str]]:
    for (operation, ranks), (planned, simulated) in stage.traffic.items():
        if max(planned, simulated) > SCALARS:
            sizes = (format_in(size, "GB", 3) for size in (planned, simulated))
            yield [operation, f"{ranks}", *sizes]


def main() -> int:
    """Write or check the page and return the exit code."""
    simulated: Stages = {}

    def render(page: str) -> str:
        simulated.update((each, simulate(each)) for each in RANKS)
        return with_tables(page, simulated)

    outdated = write_or_check(PAGE, render, "tools/docs/simulated_large_runs.py")
    far = [
        f"{each.name}, rank {each.rank}"
        for each, stages in simulated.items()
        if not all(stage.training.agrees for stage in stages)
    ]
    if far:
        print(f"planned memory is off by more than 10%: {'; '.join(far)}", file=sys.stderr)
    return int(bool(outdated or far))


if __name__ == "__main__":
    sys.exit(main())
