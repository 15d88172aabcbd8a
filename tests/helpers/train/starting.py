"""Stages that start from the same weights in every layout, and their losses."""

import torch

from megagrow.config.schema import RunConfig
from megagrow.reshard.fill import fill_initial
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import Stage, build_stage
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState


def start(run: RunConfig) -> Stage:
    stage = build_stage(run, 0, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    return stage


def losses_of(run: RunConfig, stage: Stage, state: RunState) -> tuple[list[float], RunState]:
    """Trains a stage to its end: of each step the loss, then the gradient norm."""
    feed, stop, losses = StepFeed(open_inputs(run).train), StopSignal(), []
    while isinstance(event := advance(run, stage, state, feed, stop), StepDone):
        losses += [event.measure.loss, event.measure.grad_norm]
        state = event.state
    return losses, state
