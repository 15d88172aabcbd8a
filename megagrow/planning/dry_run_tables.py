"""Tables of a dry run, and problems that prevent the run from starting."""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console

from megagrow.common.sizes import format_in
from megagrow.common.tables import print_lines, print_table
from megagrow.planning.dry_run import DryRun, RankGrowth, RankStage
from megagrow.planning.simulated import TOLERANCE, SimulatedStage
from megagrow.planning.tables import memory_rows
from megagrow.reshard.traffic import Volume
from megagrow.simulation.report import STEP

PARAMETER_COLUMNS = ("parameter", "local shape", "count", "elements held")
TRAFFIC_COLUMNS = ("sent per step", "collective", "ranks", "tensors, MB", "sent by this rank, MB")
GROWTH_COLUMNS = ("growth", "operator", "sends, MB", "to", "receives, MB", "from", "keeps, MB")
SIMULATION_COLUMNS = ("", "planned", "simulated")
WAIT_COLUMNS = ("waits of the host", "operation", "place")

PEERS_NAMED = 6
"""Maximum number of peers listed by rank; further ones are only counted."""


def print_dry_run(result: DryRun, console: Console) -> None:
    """Print a dry run; as plain Markdown tables if the output is not a terminal."""
    run, rank = result.run, result.rank
    print_lines(console, [f"{run.name}: dry run of rank {rank} of {result.world_size}"])
    for index, stage in enumerate(result.stages):
        title = f"Stage {index}: ZeRO {stage.memory.layout.zero_stage}, {_place(stage)}"
        print_table(console, PARAMETER_COLUMNS, _parameter_rows(stage), title=title)
        columns = ("", f"stage {index}")
        print_table(console, columns, _memory_rows(stage), title="Memory, GiB")
        print_table(console, TRAFFIC_COLUMNS, _traffic_rows(stage), title="Communication")
    if result.growths:
        print_table(console, GROWTH_COLUMNS, map(_growth_row, result.growths), title="Growths")
    for index, simulated in enumerate(result.simulated):
        title = f"Stage {index}: simulated step of {simulated.micro_batches} micro-batches"
        print_table(console, SIMULATION_COLUMNS, _simulation_rows(simulated), title=title)
        print_table(console, WAIT_COLUMNS, _wait_rows(simulated), title="Waits in the step")
    print_lines(console, _disagreements(result.simulated))
    print_lines(console, (f"Note: {note}" for note in result.notes))
    print_lines(console, (f"Problem: {problem}" for problem in result.problems))


def _place(stage: RankStage) -> str:
    """Return the coordinates of the rank, without context and pipeline ranks if there is one."""
    sizes = stage.memory.stage.parallel.layout_sizes(stage.memory.layout.world_size)
    outer, place = stage.rank, []
    for name, always in (("tp", True), ("cp", False), ("dp", True), ("pp", False)):
        outer, own = divmod(outer, sizes[name])
        if always or sizes[name] > 1:
            place.append(f"{name.upper()} rank {own} of {sizes[name]}")
    return ", ".join(place[::-1])


def _parameter_rows(stage: RankStage) -> Iterable[Sequence[str]]:
    for each in stage.parameters:
        yield each.name, " x ".join(map(str, each.shape)), f"{each.count:,}", f"{each.held:,}"
    yield "all", "", f"{sum(e.count for e in stage.parameters):,}", f"{stage.held:,}"


def _memory_rows(stage: RankStage) -> Iterable[Sequence[str]]:
    built = {
        "built here: forward weights": stage.weights_bytes,
        "built here: fp32 masters and moments": stage.state_bytes,
    }
    yield from ((label, _gib(size)) for label, size in built.items())
    for part, cells in memory_rows([stage.memory]).items():
        yield f"planned: {part}", cells[0]


def _traffic_rows(stage: RankStage) -> Iterable[Sequence[str]]:
    for each in stage.traffic:
        yield each.purpose, each.kind, str(each.ranks), _mb(each.payload), _mb(each.sent)
    yield "all", "", "", "", _mb(sum(each.sent for each in stage.traffic))


def _simulation_rows(stage: SimulatedStage) -> Iterator[Sequence[str]]:
    for name, peak in stage.peaks.items():
        yield (
            f"peak memory of {name}, GiB",
            *(_gib(size) for size in (peak.planned, peak.simulated)),
        )
    yield "waits of the host", "", str(stage.report.step_waits)
    for (kind, ranks), sizes in stage.traffic.items():
        yield f"{kind} of {ranks} ranks, MB", *map(_mb, sizes)


def _wait_rows(stage: SimulatedStage) -> Iterator[Sequence[str]]:
    for wait, count in stage.report.waits.items():
        if wait.section == STEP:
            yield str(count), wait.operation, str(wait.site)


def _disagreements(stages: Sequence[SimulatedStage]) -> Iterator[str]:
    for index, stage in enumerate(stages):
        for name, peak in stage.peaks.items():
            if not peak.agrees:
                yield (
                    f"Warning: stages.{index}: planned memory of {name} is {_gib(peak.planned)} "
                    f"GiB, simulated {_gib(peak.simulated)} GiB, more than {TOLERANCE:.0%} apart"
                )


def _growth_row(growth: RankGrowth) -> Sequence[str]:
    name = (f"{growth.stage - 1} -> {growth.stage}", " + ".join(growth.operators) or "none")
    volume = growth.volume
    if volume is None:
        return *name, "unknown before learning", "", "", "", ""
    received = sum(volume.received.values())
    return (
        *(*name, _mb(volume.bytes_sent), _receivers(volume)),
        *(_mb(received), _peers(volume.received), _mb(volume.kept)),
    )


def _receivers(volume: Volume) -> str:
    return "all (mixed matrices)" if volume.reduced else _peers(volume.sent)


def _peers(peers: dict[int, int]) -> str:
    named = ", ".join(map(str, list(peers)[:PEERS_NAMED]))
    more = len(peers) - PEERS_NAMED
    return f"{named} and {more} more" if more > 0 else named or "none"


def _gib(size: int) -> str:
    return format_in(size, "GiB", 3)


def _mb(size: int) -> str:
    return format_in(size, "MB", 3)
