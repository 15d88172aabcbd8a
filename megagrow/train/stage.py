"""Built stage: engine on this rank, topology, and layout of its state."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from megagrow.config.schema import RunConfig, StageConfig
from megagrow.growth.mask_schedule import stage_masks
from megagrow.model.backends import uses_bf16
from megagrow.model.masks import Masks
from megagrow.model.ops import Ops
from megagrow.parallel.context.ops import model_with_ops
from megagrow.parallel.engine import ZeroEngine
from megagrow.parallel.engine_config import EngineSettings
from megagrow.parallel.process_groups import Topology, stage_topology
from megagrow.parallel.sharding import Storage
from megagrow.parallel.tensor_parallel import rank_masks
from megagrow.reshard.layout import Layout
from megagrow.train.growth_event.new_entries import fresh_masks, has_per_entry_lr
from megagrow.train.growth_event.run_growths import stage_growth, stage_layout, stage_scales
from megagrow.train.kernel_calls import NO_CHECKS, Checks
from megagrow.train.kernel_selection import stage_ops
from megagrow.train.schedule import last_growth


@dataclass(frozen=True)
class Stage:
    """One stage of the run while it is trained."""

    index: int
    config: StageConfig
    topology: Topology
    engine: ZeroEngine
    layout: Layout
    answers_only: bool = False
    """True if the loss is the mean over labels rather than over all positions."""
    checks: Checks = field(default_factory=dict)
    """Self-check of the Triton kernels of all stages."""

    @property
    def ops(self) -> Ops:
        """Operations of the model in training."""
        return self.engine.model.ops

    @contextmanager
    def evaluating(self, sharded: bool = False) -> Iterator[None]:
        """Context of forward passes in evaluation mode, without gradients.

        Inputs are full sequences, or with `sharded` the shards of context parallelism. Only the
        latter need all context-parallel ranks.
        """
        engine, ops = self.engine, self.ops if sharded else self.engine.settings.ops
        engine.train(False)
        try:
            with torch.no_grad(), model_with_ops(engine.model, ops):
                yield
        finally:
            self.engine.train()

    def release(self) -> Storage:
        """Destroy the engine; return this rank's state, whose memory is kept."""
        return self.engine.release()


def build_stage(
    run: RunConfig, index: int, device: torch.device, checks: Checks = NO_CHECKS
) -> Stage:
    """Build an empty engine for a stage; its state must be written afterwards. Collective.

    `checks` is the result of `check_kernels`; without it, `auto` selects no Triton kernel.
    """
    config = run.stages[index]
    parallel = config.parallel
    topology = stage_topology(parallel, device)
    bf16 = uses_bf16(run, device)
    settings = EngineSettings(
        model=config.model,
        parallel=parallel,
        batch=config.batch,
        optimizer=config.optimizer,
        deepspeed=config.deepspeed,
        bf16=bf16,
        scales=stage_scales(run, index),
        ops=stage_ops(run, index, device, checks),
    )
    engine = ZeroEngine(settings, topology)
    layout = stage_layout(run, index, topology.world_size)
    check_layout(layout, engine, topology.rank)
    grown = last_growth(run, index)
    if grown is not None and has_per_entry_lr(run.stages[grown].growth):
        fresh = stage_growth(run, grown).fresh
        engine.mark_new(fresh_masks(fresh, layout, topology.rank, engine.storage()))
    answers_only = run.objective == "sft"
    return Stage(index, config, topology, engine, layout, answers_only, checks)


def masks_now(run: RunConfig, stage: Stage, stage_tokens: int) -> Masks | None:
    """Return this rank's masks after `stage_tokens` tokens of the stage; None if nothing is masked.

    The next step trains with these masks, and validation after those tokens uses them too.
    """
    masks = stage_masks(run, stage.index, stage_tokens)
    return None if masks is None else rank_masks(masks, stage.topology)


def check_layout(layout: Layout, engine: ZeroEngine, rank: int) -> None:
    """Compare the layout with DeepSpeed's bookkeeping; a difference is a bug."""
    ours = {name: layout.interval(name, rank) for name in layout.plan}
    ours = {name: interval for name, interval in ours.items() if interval}
    theirs = engine.intervals()
    for name in ours.keys() | theirs.keys():
        if ours.get(name) != theirs.get(name):
            raise AssertionError(
                f"rank {rank}: the layout assigns {ours.get(name)} of the slice of {name}, but "
                f"DeepSpeed holds {theirs.get(name)}"
            )
