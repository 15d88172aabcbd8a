"""Simulation of rank 0 of a run next to its plan: peak memory, host waits and collectives."""

from dataclasses import dataclass

from megagrow.config.schema import RunConfig
from megagrow.planning.memory import StageMemory, stage_memory
from megagrow.planning.memory_fit import on_gpu
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

    @property
    def ratio(self) -> float:
        """Planned bytes relative to the simulated ones."""
        return self.planned / self.simulated

    @property
    def agrees(self) -> bool:
        """True if the plan is within the tolerance."""
        return abs(self.ratio - 1) <= TOLERANCE


@dataclass(frozen=True)
class SimulatedStage:
    """Simulated stage of rank 0, with the plan of the same shortened step."""

    memory: StageMemory
    report: StageReport

    @property
    def training(self) -> PlannedPeak:
        """Peak of a step."""
        return PlannedPeak(on_gpu(self.memory), self.report.training_peak.size)


def simulate_run(
    run: RunConfig, world_size: int, actions: Actions = TRAINING
) -> tuple[SimulatedStage, ...]:
    """Simulate rank 0 of a run on `world_size` GPUs; `precision: auto` is bf16, as on a GPU."""
    run = shortened(run, world_size, actions.micro_batches)
    length, bf16 = run.data.sequence_length, run.precision != "fp32"
    reports = isolated(simulate_rank, run, world_size, 0, actions)
    memories = (stage_memory(stage, world_size, length, bf16) for stage in run.stages)
    return tuple(map(SimulatedStage, memories, reports))
