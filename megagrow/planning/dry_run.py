"""One rank of a big cluster, built on this machine before there is one: `train --dry-run`.

The rank's share of each stage's model is built by the code that trains it, without memory; who
holds what, and what goes where in a growth, is what the run computes itself when it starts.
Nothing is sent: the other ranks are numbers.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megagrow.checkpoint.files import list_checkpoints
from megagrow.config.schema import RunConfig
from megagrow.config.validation import world_problems
from megagrow.errors import ConfigError, InputError
from megagrow.evaluation.evaluator import need_lm_eval
from megagrow.growth.operators import is_learned
from megagrow.growth.validation import candidates, growth_problems
from megagrow.parallel.engine_config import EngineSettings
from megagrow.parallel.materialize import build_model
from megagrow.parallel.process_groups import Topology
from megagrow.planning.memory import STATE_BYTES, StageMemory
from megagrow.planning.traffic import Traffic, step_traffic
from megagrow.reshard.traffic import Volume, rank_volume
from megagrow.train.data_setup import input_problems
from megagrow.train.growth_event.run_growths import stage_growth, stage_layout, with_operators
from megagrow.train.init_from import check_beginning

_LAYER = re.compile(r"\.layers\.\d+\.")


@dataclass(frozen=True)
class Held:
    """Parameters of one name in all layers, and what the rank has of them."""

    name: str
    """With `*` for the number of the layer."""
    shape: tuple[int, ...]
    """Of one of them, after tensor parallelism."""
    count: int
    held: int
    """Elements of their optimizer state on this rank, all together."""


@dataclass(frozen=True)
class RankStage:
    """One stage as the rank has it."""

    parameters: tuple[Held, ...]
    weights_bytes: int
    """Forward weights that were built: under ZeRO-3 the rank's part of them."""
    memory: StageMemory
    """The planner's account, of the rank that holds most."""
    traffic: tuple[Traffic, ...]

    @property
    def held(self) -> int:
        """Elements of the optimizer's state."""
        return sum(each.held for each in self.parameters)

    @property
    def state_bytes(self) -> int:
        """fp32 masters and both moments."""
        return STATE_BYTES * self.held


@dataclass(frozen=True)
class RankGrowth:
    """One way in which a stage may come out of the one before."""

    stage: int
    """The stage that begins with it."""
    operators: tuple[str, ...]
    volume: Volume | None
    """None where the map is learned: before that nobody knows what it takes."""


@dataclass(frozen=True)
class Rehearsal:
    """A rank of a run."""

    run: RunConfig
    world_size: int
    rank: int
    problems: tuple[str, ...]
    """All that would keep the run from starting."""
    notes: tuple[str, ...]
    stages: tuple[RankStage, ...]
    """Empty where the run does not fit the ranks."""
    growths: tuple[RankGrowth, ...]


def rehearse(run: RunConfig, world_size: int, rank: int = 0) -> Rehearsal:
    """Builds `rank` of a run on `world_size` ranks. InputError for a rank that there is not.

    `precision: auto` is taken as bf16, as on a GPU.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"--rank {rank}: a world of {world_size} has ranks 0 to {world_size - 1}")
    wrong = [*growth_problems(run), *world_problems(run, world_size)]
    notes: list[str] = []
    problems = [*wrong, *input_problems(run), *_surroundings(run, notes), *_evaluation(run, notes)]
    stages: tuple[RankStage, ...] = ()
    growths: tuple[RankGrowth, ...] = ()
    if not wrong:
        stages = tuple(_stage(run, index, world_size, rank) for index in range(len(run.stages)))
        growths = tuple(_growths(run, world_size, rank))
    return Rehearsal(run, world_size, rank, tuple(problems), tuple(notes), stages, growths)


def _surroundings(run: RunConfig, notes: list[str]) -> Iterator[str]:
    """What is wrong with the folders of the run; and what is worth a note."""
    try:
        source = check_beginning(run)
        if source is not None:
            notes.append(f"weights initialized from {source.path}")
    except (InputError, OSError) as error:
        yield str(error)
    there = _nearest(run.output_dir)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield f"output_dir = {run.output_dir}: {there} is no directory that can be written to"
    saved = list_checkpoints(run.output_dir / "checkpoints")
    if saved:
        notes.append(f"there is a checkpoint: the run would go on from {saved[-1]}")
    if run.precision == "auto":
        notes.append("precision auto is taken as bf16, as on a GPU")
    notes.append("which kernels can run is seen on the machines alone: megagrow doctor --run")


def _evaluation(run: RunConfig, notes: list[str]) -> Iterator[str]:
    """What is missing for the evaluations of the run, short of loading their tasks."""
    if run.evaluation is None:
        return
    try:
        need_lm_eval()
    except InputError as error:
        yield str(error)
    folder = run.evaluation.data_dir
    if folder is not None and not folder.is_dir():
        yield f"evaluation.data_dir = {folder}: no such directory"
    notes.append("the tasks of the evaluation are loaded, and checked, when the run starts")


def _nearest(path: Path) -> Path:
    """The path, or the first one above it that is there."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _stage(run: RunConfig, index: int, world_size: int, rank: int) -> RankStage:
    config, bf16 = run.stages[index], run.precision != "fp32"
    layout = stage_layout(run, index, world_size)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dp_group = dist.ProcessGroup(store, rank // layout.tp, layout.dp)
    tp_group = dist.ProcessGroup(store, rank % layout.tp, layout.tp)
    topology = Topology(rank, layout.dp, layout.tp, dp_group, tp_group, torch.device("meta"))
    settings = EngineSettings(config.model, config.parallel, config.batch, config.optimizer, bf16)
    low = bf16 and layout.zero_stage > 0
    dtype = torch.bfloat16 if low else torch.float32
    model = build_model(layout.plan, settings, topology, dtype)
    found: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    weights = 0
    for name, parameter in model.named_parameters():
        held = len(layout.interval(name, topology.dp_rank))
        numel = held if layout.zero_stage == 3 else parameter.numel()
        weights += numel * parameter.element_size()
        key = (_LAYER.sub(".layers.*.", name), tuple(parameter.shape))
        found.setdefault(key, []).append(held)
    parameters = tuple(Held(*key, len(each), sum(each)) for key, each in found.items())
    memory = StageMemory(config, layout, run.data.sequence_length, bf16)
    return RankStage(parameters, weights, memory, tuple(step_traffic(memory)))


def _growths(run: RunConfig, world_size: int, rank: int) -> Iterator[RankGrowth]:
    for index in range(1, len(run.stages)):
        options = run.stages[index].growth
        assert options is not None
        for chosen in candidates(options):
            names = tuple(chosen.operator)
            volume = None
            if not is_learned(chosen):
                grown = with_operators(run, index, names)
                sides = [stage_layout(grown, at, world_size) for at in (index - 1, index)]
                volume = rank_volume(rank, sides[0], stage_growth(grown, index), sides[1])
            yield RankGrowth(index, names, volume)
