"""Simulation of a rank next to its plan: peak memory, host waits and collectives of a step."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megagrow.config.schema import RunConfig
from megagrow.growth.operators import is_learned
from megagrow.planning.memory import StageMemory, stage_memory
from megagrow.planning.memory_fit import growth_peak, on_gpu
from megagrow.planning.traffic import step_traffic
from megagrow.simulation.isolated import isolated
from megagrow.simulation.rank import TRAINING, Actions, shortened, simulate_rank
from megagrow.simulation.report import StageReport

TOLERANCE = 0.1
"""Largest difference between planned and simulated memory, relative to the simulated one."""


@dataclass(frozen=True)
class PlannedPeak:
    """Planned and simulated peak of memory in bytes."""

    planned: int
    simulated: int
    bound: bool = False
    """True if the planned peak is an upper bound."""

    @property
    def ratio(self) -> float:
        """Planned bytes relative to the simulated ones."""
        return self.planned / self.simulated

    @property
    def agrees(self) -> bool:
        """True if the plan is within the tolerance, or a bound is not exceeded by more."""
        return self.ratio >= 1 - TOLERANCE and (self.bound or self.ratio <= 1 + TOLERANCE)


@dataclass(frozen=True)
class SimulatedStage:
    """Simulated stage of a rank, with the plan of the same shortened step."""

    memory: StageMemory
    report: StageReport
    planned_growth: int | None = None
    """Planned peak of the growth at the start of the stage; None without a simulated one."""

    @property
    def training(self) -> PlannedPeak:
        """Peak of a step."""
        return PlannedPeak(on_gpu(self.memory), self.report.training_peak.size)

    @property
    def growth(self) -> PlannedPeak | None:
        """Peak of the growth."""
        if self.planned_growth is None:
            return None
        return PlannedPeak(self.planned_growth, self.report.peaks["growth"].size, bound=True)

    @property
    def peaks(self) -> dict[str, PlannedPeak]:
        """Peaks by name."""
        return {"a step": self.training} | ({"the growth": self.growth} if self.growth else {})

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the simulated step."""
        stage = self.memory.stage
        replicas = stage.parallel.data_parallel_size(self.memory.layout.world_size)
        return stage.batch.global_batch_size // (stage.batch.micro_batch_size * replicas)

    @property
    def traffic(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Planned and simulated bytes of full tensors by collective and number of ranks."""
        planned: Counter[tuple[str, int]] = Counter()
        for each in step_traffic(self.memory):
            planned[each.kind, each.ranks] += each.payload
        found = self.report.step_traffic
        return {key: (planned[key], found[key]) for key in planned | found}


def simulate_run(
    run: RunConfig, world_size: int, rank: int = 0, actions: Actions = TRAINING
) -> tuple[SimulatedStage, ...]:
    """Simulate a rank of a run on `world_size` GPUs; `precision: auto` is bf16, as on a GPU."""
    run = shortened(run, world_size, actions.micro_batches)
    bf16 = run.precision != "fp32"
    reports = isolated(simulate_rank, run, world_size, rank, actions)
    memories = [stage_memory(stage, world_size, bf16).at_rank(rank) for stage in run.stages]
    growths = _growth_peaks(memories, actions)
    return tuple(map(SimulatedStage, memories, reports, growths))


def simulate_growing_run(run: RunConfig, world_size: int, rank: int) -> tuple[SimulatedStage, ...]:
    """Simulate a rank of a run, growths included if none is learned."""
    learned = any(stage.growth and is_learned(stage.growth) for stage in run.stages)
    return simulate_run(run, world_size, rank, Actions(growth=not learned))


def _growth_peaks(memories: Sequence[StageMemory], actions: Actions) -> Iterator[int | None]:
    yield None
    for source, target in pairwise(memories):
        yield growth_peak(source, target) if actions.growth else None
