"""Simulated parts of a run other than its steps: load, evaluate and save."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast
from unittest.mock import patch

import torch
from torch import Tensor

from megagrow.checkpoint import load as checkpoint_load
from megagrow.checkpoint.discovery import shard_name
from megagrow.checkpoint.load import load_storage
from megagrow.checkpoint.manifest import Manifest
from megagrow.checkpoint.shards import own_tensors
from megagrow.checkpoint.snapshot import Snapshot
from megagrow.evaluation.forward_model import ForwardModel
from megagrow.evaluation.likelihood import Pair, log_likelihoods
from megagrow.evaluation.logprobs import ModelScorer
from megagrow.parallel.process_groups import Topology
from megagrow.reshard.layout import Layout
from megagrow.simulation.recorder import Recorder
from megagrow.train.stage import Stage
from megagrow.train.state_check import non_finite

LIKELIHOOD, PROMPT = "likelihood", "prompt"
"""Sections: a batch of continuations, and the first pass of a generation."""
TOKENS = ("greedy token", "sampled token", "token after an end")
"""Sections: passes of one token per text; one of two texts ends before the last pass."""
FINISH = "end of evaluation"
SECTIONS = (LIKELIHOOD, PROMPT, *TOKENS, FINISH)

PAIRS: list[Pair] = [([1, 2, 3], [4]), ([1, 2, 3], [5]), ([6], [7, 8, 9])]
PROMPTS = [[1, 2, 3, 4], [5]]
"""Texts of unequal lengths."""


@torch.no_grad()
def evaluate(model: ForwardModel, topology: Topology, recorder: Recorder) -> None:
    """Score one batch of continuations, and generate tokens with the key/value cache."""
    scorer = ModelScorer(model, topology)
    recorder.begin(LIKELIHOOD)
    log_likelihoods(PAIRS, scorer, model.config.max_position_embeddings, len(PAIRS))
    recorder.begin(PROMPT)
    decoder = scorer.decode(PROMPTS)
    decoder.next_tokens([None] * len(PROMPTS))
    greedy, sampled, after_end = TOKENS
    recorder.begin(greedy)
    decoder.next_tokens([None] * len(PROMPTS))
    recorder.begin(sampled)
    decoder.next_tokens([_most_likely] * len(PROMPTS))
    recorder.begin(after_end)
    decoder.keep([1])
    decoder.next_tokens([None])
    recorder.begin(FINISH)
    scorer.finish()


def _most_likely(logits: Tensor) -> int:
    return int(logits.argmax())


def save(stage: Stage) -> None:
    """Check a stage's state and copy it to host memory, as a checkpoint does."""
    non_finite(stage)
    own = own_tensors(stage.layout, stage.engine.storage(), stage.topology.rank)
    snapshot = Snapshot(stage.topology.device)
    snapshot.begin()
    snapshot.copy(own)


def load(stage: Stage) -> None:
    """Fill the state from a checkpoint of zeros in the stage's own layout."""
    layout = stage.layout
    files = {
        shard_name(rank): partial(_ZeroFile, layout, rank) for rank in range(layout.world_size)
    }
    manifest = cast(Manifest, SimpleNamespace(adam_step=0, read_layout=lambda: layout))
    with patch.object(checkpoint_load, "safe_open", lambda path, framework: files[path.name]()):
        load_storage(Path(), manifest, layout, stage.engine.storage())
    stage.engine.ready(0)


class _ZeroFile:
    """Shard file of a rank that contains zeros, with the interface of `safetensors.safe_open`."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self._layout, self._rank = layout, rank

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_slice(self, name: str) -> Any:
        held = len(self._layout.interval(name.rpartition(".")[0], self._rank))
        return _ZeroSlice(held)


class _ZeroSlice:
    """Tensor of a shard file: (size,) fp32 zeros, with the interface of safetensors' slices."""

    def __init__(self, size: int) -> None:
        self._size = size

    def get_dtype(self) -> str:
        return "F32"

    def get_shape(self) -> list[int]:
        return [self._size]

    def __getitem__(self, part: slice) -> Tensor:
        return torch.zeros(part.stop - part.start)
