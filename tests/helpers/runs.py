"""Tiny runs for tests: a random corpus on disk, a run config, and what a run leaves behind."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megagrow.config.schema import RunConfig
from megagrow.config.stage_length import tokens_between
from megagrow.data.indexed import IndexedWriter
from megagrow.data.stage_streams import StreamPlace
from megagrow.parallel.sharding import ParamSpec, Storage
from megagrow.reshard.fill import fill_initial
from megagrow.reshard.layout import Layout
from megagrow.train.data_setup import open_inputs
from megagrow.train.fault_tolerance.signals import StopSignal
from megagrow.train.growth_event.cost import Feed
from megagrow.train.growth_event.event import GrowthReport, end_stage, grow
from megagrow.train.loop import StepDone, advance
from megagrow.train.stage import Stage, build_stage, masks_now
from megagrow.train.step import mean_loss
from megagrow.train.step_feed import StepFeed
from megagrow.train.train_state import RunState

MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
"""GQA, a feed-forward width and a vocabulary that are no powers of two."""


def train_stage(run: RunConfig, index: int, steps: int, sequences: int) -> list[float]:
    """A stage of a run from initial weights: of each step the loss, the gradient norm, and before
    it a loss measured on so many sequences. All ranks together."""
    stage = build_stage(run, index, torch.device("cpu"))
    fill_initial(stage.layout, stage.topology.rank, stage.engine.storage(), run.seed)
    stage.engine.ready(0)
    inputs, stop, out = open_inputs(run), StopSignal(), []
    feed = StepFeed(inputs.train)
    state = RunState(stage=index)
    for _ in range(steps):
        masks = masks_now(run, stage, state.stage_tokens)
        out.append(mean_loss(stage, inputs.stages[index].fixed, sequences, masks))
        event = advance(run, stage, state, feed, stop)
        assert isinstance(event, StepDone)
        out += [event.measure.loss, event.measure.grad_norm]
        state = event.state
    stage.release()
    return out


def write_corpus(prefix: Path, documents: int = 40, vocab_size: int = 101, seed: int = 0) -> Path:
    """A corpus with something to learn: each token is mostly a function of the one before."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(documents):
            tokens = [int(generator.integers(vocab_size))]
            for _ in range(int(generator.integers(20, 200))):
                follows = (tokens[-1] * 7 + 3) % vocab_size
                tokens.append(
                    follows if generator.random() < 0.8 else int(generator.integers(vocab_size))
                )
            writer.add_document(np.array(tokens, dtype=np.uint16))
        writer.finalize()
    return prefix


def make_run(tmp: Path, stages: list[dict[str, Any]], **changes: Any) -> RunConfig:
    """A run over the corpus at tmp/train; `stages` are filled up with small defaults."""
    if not (tmp / "train.bin").exists():
        write_corpus(tmp / "train")
        write_corpus(tmp / "validation", documents=10, seed=1)
    filled = [
        {
            "model": MODEL,
            "batch": {"global_batch_size": 4, "micro_batch_size": 1},
            "optimizer": {"lr": 1e-2, "weight_decay_on": "matrices"},
            "schedule": {"type": "cosine", "warmup_steps": 3},
            **stage,
        }
        for stage in stages
    ]
    values = {
        "name": "test",
        "output_dir": tmp / "run",
        "data": {
            "train": [{"path": tmp / "train"}],
            "validation": [{"path": tmp / "validation"}],
            "sequence_length": 16,
        },
        "stages": filled,
        "checkpoint": {"interval": 1000},
        "logging": {"tensorboard": False},
        "validation": {"tokens": 256},
        **changes,
    }
    return RunConfig.model_validate(values)


def train_to_end(run: RunConfig, stage: Stage, state: RunState | None = None) -> RunState:
    """Train to the end of a stage; return the last state. All ranks together."""
    feed, stop = StepFeed(open_inputs(run).train), StopSignal()
    state = RunState() if state is None else state
    while isinstance(event := advance(run, stage, state, feed, stop), StepDone):
        state = event.state
    return state


STEP_TOKENS = 4 * 16
"""Tokens of one step of a run made by `make_run`."""


def parallel_of(
    zero: int, tp: int, sequence_parallel: bool = False, recompute: str = "none"
) -> dict:
    """A stage's `parallel` section."""
    return {
        "zero_stage": zero,
        "tensor_model_parallel_size": tp,
        "sequence_parallel": sequence_parallel,
        "activation_checkpointing": recompute,
    }


def full_tensors(layout: Layout, storage: Storage) -> dict[str, dict[str, torch.Tensor]]:
    """Every logical tensor, gathered from all ranks the plain way: by where each element goes.

    Independent of reshard/: positions are numbered, sliced and flattened as tensors.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {n: dict(kinds) for n, kinds in storage.items()})
    out = {}
    for name, spec in layout.plan.items():
        numbers = _numbered_slices(spec, layout.tp)
        full = {kind: torch.full((spec.padded_rows * spec.cols,), torch.nan) for kind in spec.kinds}
        for rank, held in enumerate(everyone):
            if name in held:
                interval = layout.interval(name, rank)
                where = numbers[rank % layout.tp][interval.start : interval.stop]
                for kind in spec.kinds:
                    full[kind][where] = held[name][kind]
        out[name] = {k: v.view(-1, spec.cols)[: spec.rows] for k, v in full.items()}
    return out


def _numbered_slices(spec: ParamSpec, tp: int) -> list[torch.Tensor]:
    """For each tensor-parallel rank the global element numbers of its flattened slice."""
    whole = torch.arange(spec.padded_rows * spec.cols).view(spec.padded_rows, spec.cols)
    if spec.tp_dim is None:
        return [whole.flatten()] * tp
    return [part.flatten() for part in whole.chunk(tp, dim=spec.tp_dim)]


def grow_live(run: RunConfig, stage: Stage) -> tuple[Stage, GrowthReport]:
    """The next stage of a run, grown at the point of its stream where the base has ended."""
    place = StreamPlace(tokens_between(run, 0, stage.index + 1))
    feed = Feed(StepFeed(open_inputs(run).train), place)
    return grow(run, end_stage(stage), feed)
