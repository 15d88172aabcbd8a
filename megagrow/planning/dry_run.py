"""Dry run of one rank of a cluster on the local machine: `train --dry-run`.

The rank's part of each stage's model is built by the training code on the meta device. Layouts and
growth transfers are computed by the code that the run executes. Nothing is communicated.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megagrow.checkpoint.discovery import last_valid, list_checkpoints
from megagrow.checkpoint.manifest import read_manifest
from megagrow.config.differences import ConfigChange
from megagrow.config.parallel_rules import world_problems
from megagrow.config.schema import ParallelConfig, RunConfig
from megagrow.data.corpus_identity import Contents
from megagrow.errors import ConfigError, InputError
from megagrow.evaluation.evaluator import require_lm_eval, require_transformers
from megagrow.growth.operators import is_learned
from megagrow.growth.validation import candidates, growth_problems
from megagrow.parallel.engine_config import EngineSettings
from megagrow.parallel.materialize import build_model
from megagrow.parallel.process_groups import Topology
from megagrow.planning.memory import StageMemory
from megagrow.planning.memory_fit import fit_micro_batches
from megagrow.planning.simulated import SimulatedStage, simulate_growing_run
from megagrow.planning.traffic import Traffic, step_traffic
from megagrow.reshard.layout import Layout
from megagrow.reshard.traffic import Volume, rank_volume
from megagrow.train.config_changes import (
    changes_since_source,
    check_changes,
    checkpoint_changes,
)
from megagrow.train.data_setup import open_or_list_problems
from megagrow.train.growth_event.run_growths import stage_growth, stage_layout, with_operators
from megagrow.train.init_from import check_beginning

_LAYER = re.compile(r"\.layers\.\d+\.")


@dataclass(frozen=True)
class ParameterShare:
    """Parameters of one name over all layers, and the rank's share of them."""

    name: str
    """Name with `*` in place of the layer index."""
    shape: tuple[int, ...]
    """Shape of one parameter after tensor-parallel slicing."""
    count: int
    held: int
    """Total elements of their optimizer state on this rank."""


@dataclass(frozen=True)
class RankStage:
    """Share of one rank in a stage."""

    rank: int
    parameters: tuple[ParameterShare, ...]
    weights_bytes: int
    """Bytes of forward weights; under ZeRO-3 of the rank's partition."""
    memory: StageMemory
    """Planned memory of the rank's pipeline rank, for the largest share of each part."""
    traffic: tuple[Traffic, ...]

    @property
    def held(self) -> int:
        """Elements of the optimizer state."""
        return sum(each.held for each in self.parameters)

    @property
    def state_bytes(self) -> int:
        """Bytes of fp32 master weights and optimizer state."""
        return self.memory.state_of(self.rank)


@dataclass(frozen=True)
class RankGrowth:
    """Growth of a stage by one candidate operator, or the transition to a stage without growth."""

    stage: int
    """Index of the stage that begins."""
    operators: tuple[str, ...]
    """Empty without growth."""
    volume: Volume | None
    """None for a learned operator: its traffic is unknown before training."""


@dataclass(frozen=True)
class DryRun:
    """Result of a dry run of one rank."""

    run: RunConfig
    world_size: int
    rank: int
    problems: tuple[str, ...]
    """Problems that prevent the run from starting."""
    notes: tuple[str, ...]
    stages: tuple[RankStage, ...]
    """Empty if the run is not valid on this number of ranks."""
    growths: tuple[RankGrowth, ...]
    simulated: tuple[SimulatedStage, ...]
    """Empty unless a simulation is requested and the run is valid."""


def dry_run(
    run: RunConfig,
    world_size: int,
    rank: int = 0,
    allowed: Sequence[str] = (),
    simulate: bool = False,
    gpu_memory: int | None = None,
) -> DryRun:
    """Build `rank` of a run on `world_size` ranks. Raises ConfigError for an invalid rank.

    `precision: auto` is planned as bf16, as on a GPU. `allowed` are the keys of `--allow-change`.
    `simulate` also runs a step of each stage and each growth on a simulated GPU. `gpu_memory` are
    the bytes of a GPU, from which `micro_batch_size: auto` is computed.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"--rank {rank}: a world size of {world_size} has ranks 0 to {world_size - 1}"
        )
    invalid = [*growth_problems(run), *world_problems(run, world_size)]
    if not invalid:
        try:
            run = fit_micro_batches(run, world_size, gpu_memory, run.precision != "fp32")
        except ConfigError as error:
            invalid.append(str(error))
    notes: list[str] = []
    inputs, unread = open_or_list_problems(run)
    if inputs is not None:
        notes += [*(each.line() for each in inputs.epochs), *inputs.warnings]
    problems = [*invalid, *unread, *_evaluation(run, notes)]
    problems += _start(run, None if inputs is None else inputs.contents, allowed, notes)
    problems += [*_samples(run, inputs is not None), *_output_dir(run)]
    stages: tuple[RankStage, ...] = ()
    growths: tuple[RankGrowth, ...] = ()
    if not invalid:
        stages = tuple(_stage(run, index, world_size, rank) for index in range(len(run.stages)))
        growths = tuple(_growths(run, world_size, rank))
    simulated = simulate_growing_run(run, world_size, rank) if simulate and not invalid else ()
    return DryRun(run, world_size, rank, tuple(problems), tuple(notes), stages, growths, simulated)


def _start(
    run: RunConfig, contents: Contents | None, allowed: Sequence[str], notes: list[str]
) -> Iterator[str]:
    """Yield problems of the checkpoint or the source that the run starts from; append notes."""
    try:
        folder = run.output_dir / "checkpoints"
        saved = last_valid(folder, list_checkpoints(folder), read_manifest)
        source = None if saved else check_beginning(run)
        changes: list[ConfigChange] = []
        if saved is not None:
            path, manifest = saved
            notes.append(f"the run would resume from its checkpoint {path}")
            changes = checkpoint_changes(run, contents, manifest)
        elif source is not None:
            notes.append(f"weights initialized from {source.path}")
            changes = changes_since_source(run, contents, source)
        notes.extend(f"config {change}" for change in changes)
        origin = f"init_from = {run.init_from}" if saved is None else str(saved[0])
        check_changes(changes, allowed, origin)
    except (InputError, OSError) as error:
        yield str(error)
    if run.precision == "auto":
        notes.append("precision auto is planned as bf16, as on a GPU")
    notes.append("kernel backends can be checked only on the training hosts: megagrow doctor --run")


def _output_dir(run: RunConfig) -> Iterator[str]:
    """Yield the problem of an output directory that cannot be written."""
    parent = _nearest_existing(run.output_dir)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        yield f"output_dir = {run.output_dir}: {parent} is not a writable directory"


def _evaluation(run: RunConfig, notes: list[str]) -> Iterator[str]:
    """Yield missing requirements of the run's evaluations, without loading their tasks."""
    evaluations = [stage.evaluation for stage in run.stages if stage.evaluation is not None]
    if not evaluations:
        return
    try:
        require_lm_eval()
    except InputError as error:
        yield str(error)
    for folder in dict.fromkeys(each.data_dir for each in evaluations):
        if folder is not None and not folder.is_dir():
            yield f"evaluation.data_dir = {folder}: no such directory"
    notes.append("evaluation tasks are loaded and checked when the run starts")


def _samples(run: RunConfig, readable: bool) -> Iterator[str]:
    """Yield the problem of the run's samples; `readable` states that its tokenizer can be read."""
    if run.samples is None:
        return
    try:
        require_transformers()
        from megagrow.evaluation.samples import prompts_of, tokenizer_for

        prompts = prompts_of(run.samples)
        if readable:
            tokenizer_for(prompts, run)
    except InputError as error:
        yield str(error)


def _nearest_existing(path: Path) -> Path:
    """Return the path or its closest existing parent."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _stage(run: RunConfig, index: int, world_size: int, rank: int) -> RankStage:
    config, bf16 = run.stages[index], run.precision != "fp32"
    layout = stage_layout(run, index, world_size)
    topology = _topology(config.parallel, layout, rank)
    settings = EngineSettings(config.model, config.parallel, config.batch, config.optimizer, bf16)
    low = bf16 and layout.zero_stage > 0
    dtype = torch.bfloat16 if low else torch.float32
    model = build_model(layout.plan, settings, topology, dtype)
    shares: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    weights = 0
    for name, parameter in model.named_parameters():
        held = len(layout.interval(name, rank)) if name in layout.plan else 0  # a tied head
        numel = held if layout.zero_stage == 3 else parameter.numel()
        weights += numel * parameter.element_size()
        key = (_LAYER.sub(".layers.*.", name), tuple(parameter.shape))
        shares.setdefault(key, []).append(held)
    parameters = tuple(ParameterShare(*key, len(each), sum(each)) for key, each in shares.items())
    memory = StageMemory(config, layout, bf16).at_rank(rank)
    return RankStage(rank, parameters, weights, memory, tuple(step_traffic(memory)))


def _topology(parallel: ParallelConfig, layout: Layout, rank: int) -> Topology:
    """Return the grid of a rank, with process groups that cannot communicate."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    cp, pp = parallel.context_parallel_size, parallel.pipeline_model_parallel_size
    dp_rank, tp_rank = rank // layout.tp % layout.dp, rank % layout.tp
    return Topology(
        rank,
        layout.dp,
        layout.tp,
        dist.ProcessGroup(store, dp_rank, layout.dp),
        dist.ProcessGroup(store, tp_rank, layout.tp),
        torch.device("meta"),
        cp,
        pp,
        dist.ProcessGroup(store, dp_rank % cp, cp) if cp > 1 else None,
        dist.ProcessGroup(store, rank // (layout.dp * layout.tp), pp) if pp > 1 else None,
    )


def _growths(run: RunConfig, world_size: int, rank: int) -> Iterator[RankGrowth]:
    for index in range(1, len(run.stages)):
        options = run.stages[index].growth
        if options is None:
            yield RankGrowth(index, (), _volume(run, index, world_size, rank))
            continue
        for chosen in candidates(options):
            names = tuple(chosen.operator)
            volume = None
            if not is_learned(chosen):
                volume = _volume(with_operators(run, index, names), index, world_size, rank)
            yield RankGrowth(index, names, volume)


def _volume(run: RunConfig, index: int, world_size: int, rank: int) -> Volume:
    sides = [stage_layout(run, at, world_size) for at in (index - 1, index)]
    return rank_volume(rank, sides[0], stage_growth(run, index), sides[1])
