"""Write the tables of docs/reference/simulated-memory.md: planned and simulated memory of a rank.

python tools/docs/simulated_memory.py          simulate every hardware profile, update the page
python tools/docs/simulated_memory.py --check  exit with code 1 if the page is out of date

Both exit with code 1 if a planned figure is off by more than 10%. As many profiles as there are
cores are simulated at a time; all together take about 6 minutes of CPU time.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from megagrow.common.sizes import format_in  # noqa: E402
from megagrow.common.tables import markdown_table  # noqa: E402
from megagrow.config.stage import format_layout  # noqa: E402
from megagrow.planning.simulated import SimulatedStage, simulate_run  # noqa: E402
from megagrow.simulation.categories import CATEGORIES  # noqa: E402
from megagrow.simulation.rank import Actions  # noqa: E402
from megagrow.simulation.report import STEP  # noqa: E402
from tools.docs.generated_page import write_or_check  # noqa: E402
from tools.docs.hardware_profiles import Profile, hardware_profiles  # noqa: E402

PAGE = ROOT / "docs/reference/simulated-memory.md"
BEGIN, END = "<!-- tables: tools/docs/simulated_memory.py -->", "<!-- end of the tables -->"
MACHINE = "8x8xh100"
"""GPUs of the profiles whose reports are shown in full; every size has one."""

PEAK_COLUMNS = (
    *("profile", "model", "ranks", "layout", "checkpointing", "planned, GiB", "simulated, GiB"),
    *("ratio", "phase of the peak"),
)
COLLECTIVE_COLUMNS = ("profile", "collective", "ranks", "dtype", "calls", "tensors, GB")

Simulated = Mapping[Profile, SimulatedStage]


def simulate_all() -> Simulated:
    """Simulate every profile with its largest model; the largest models first."""
    profiles = hardware_profiles()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        stages = dict(zip(profiles[::-1], pool.map(_simulate, profiles[::-1]), strict=True))
    return {profile: stages[profile] for profile in profiles}


def _simulate(profile: Profile) -> SimulatedStage:
    run = profile.run(profile.model)
    (stage,) = simulate_run(run, profile.world_size, actions=Actions(micro_batches=1))
    return stage


def with_tables(page: str, simulated: Simulated) -> str:
    """Return the page with up-to-date tables."""
    before, rest = page.split(BEGIN)
    peaks = markdown_table(PEAK_COLUMNS, [_peak_row(*item) for item in simulated.items()])
    full = {each: stage for each, stage in simulated.items() if each.name.startswith(f"{MACHINE}-")}
    names = [f"`{profile.name}`" for profile in full]
    report = markdown_table(("", *names), _report_rows(list(full.values())))
    collectives = markdown_table(COLLECTIVE_COLUMNS, _collective_rows(full))
    tables = "\n\n".join([peaks, "## Reports", report, "## Collectives", collectives])
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def _peak_row(profile: Profile, stage: SimulatedStage) -> list[str]:
    peak, parallel = stage.training, stage.memory.stage.parallel
    return [
        f"`{profile.name}`",
        profile.model,
        f"{profile.world_size}",
        format_layout(parallel.zero_stage, stage.report.dp, stage.report.tp),
        parallel.activation_checkpointing,
        _gib(peak.planned),
        _gib(peak.simulated),
        f"{peak.ratio:.3f}",
        stage.report.peak_phase,
    ]


def _report_rows(stages: list[SimulatedStage]) -> Iterator[list[str]]:
    reports = [stage.report for stage in stages]
    for name in CATEGORIES:
        yield [f"{name}, GiB", *(_gib(each.training_peak.categories[name]) for each in reports)]
    yield ["peak, GiB", *(_gib(each.training_peak.size) for each in reports)]
    yield ["waits of the host", *(f"{each.step_waits}" for each in reports)]
    yield ["copies from pinned memory", *(f"{each.step_copies(pinned=True)}" for each in reports)]
    pageable = (f"{each.step_copies(pinned=False)}" for each in reports)
    yield ["copies from pageable memory", *pageable]


def _collective_rows(simulated: Simulated) -> Iterator[list[str]]:
    for profile, stage in simulated.items():
        for call, totals in stage.report.collectives.items():
            if call.section == STEP:
                yield [
                    f"`{profile.name}`",
                    call.operation,
                    f"{call.ranks}",
                    str(call.dtype).removeprefix("torch."),
                    f"{totals.calls}",
                    format_in(totals.payload, "GB", 3),
                ]


def _gib(size: int) -> str:
    return format_in(size, "GiB", 1)


def main() -> int:
    """Write or check the page and return the exit code."""
    simulated: dict[Profile, SimulatedStage] = {}

    def render(page: str) -> str:
        simulated.update(simulate_all())
        return with_tables(page, simulated)

    outdated = write_or_check(PAGE, render, "tools/docs/simulated_memory.py")
    far = [profile.name for profile, stage in simulated.items() if not stage.training.agrees]
    if far:
        print(f"planned memory is off by more than 10%: {', '.join(far)}", file=sys.stderr)
    return int(bool(outdated or far))


if __name__ == "__main__":
    sys.exit(main())
