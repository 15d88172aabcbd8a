"""Checkpoints of known states, for tests: any model and layout, no engine needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megagrow.checkpoint.manifest import Manifest, describe_layout
from megagrow.checkpoint.save import Save
from megagrow.checkpoint.shards import own_tensors
from megagrow.common.checksums import Files
from megagrow.config.schema import ModelConfig
from megagrow.parallel.sharding import Storage, parameter_plan
from megagrow.reshard.layout import Layout
from tests.helpers.hugging_face import tiny
from tests.helpers.reshard.definition import random_state, storage_of

MODEL = tiny(num_key_value_heads=4, tie_word_embeddings=True)
RUN = {"stage": 1, "stage_tokens": 192, "provenance": [[0, 1]], "counters": {"tokens": 2**40 + 1}}
ENVIRONMENT = {"versions": {"torch": "2"}, "config": {"name": "a run"}}


def manifest_of(
    layout: Layout, adam_step: int = 11, model: ModelConfig = MODEL, **changes: Any
) -> Callable[[Files], Manifest]:
    """Makes the manifest of a checkpoint from the records of its files."""
    return lambda files: Manifest(
        **{
            "model": model.model_dump(),
            "layout": describe_layout(layout),
            "adam_step": adam_step,
            "run": RUN,
            "environment": ENVIRONMENT,
            "files": files,
        }
        | changes
    )


def save_checkpoint(
    directory: Path,
    step: int,
    layout: Layout,
    storage: Storage,
    manifest: Callable[[Files], Manifest],
) -> Path:
    """Save the state of all ranks as directory/step-N and return that path. Collective."""
    save = Save(directory, step)
    tensors = own_tensors(layout, storage, dist.get_rank())
    save.begin(tensors)
    save.publish(lambda: save.write(tensors), manifest)
    return save.final


def save_random(directory: Path, step: int, layout: Layout) -> Path:
    """Saves the random state whose seed is the step; all ranks together."""
    state = random_state(parameter_plan(MODEL, 1), seed=step)
    storage = storage_of(layout, state, dist.get_rank())
    return save_checkpoint(directory, step, layout, storage, manifest_of(layout))
