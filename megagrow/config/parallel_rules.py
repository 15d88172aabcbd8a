"""Constraints of a stage's parallelism. Problems are returned as one-line texts."""

import math
from collections.abc import Iterator

from megagrow.config.schema import RunConfig
from megagrow.config.stage import MODEL_PARALLEL_KEYS, StageConfig
from megagrow.model.layers.table import indivisible_sizes


def world_problems(run: RunConfig, world_size: int) -> list[str]:
    """Return all problems of a run on `world_size` ranks."""
    return [text for i, s in enumerate(run.stages) for text in _world(s, world_size, f"stages.{i}")]


def parallel_problems(stage: StageConfig, at: str) -> Iterator[str]:
    """Yield all problems of a stage that do not depend on the number of ranks."""
    sequence_length = stage.data.sequence_length
    tensor = stage.parallel.tensor_model_parallel_size
    key = f"{at}.parallel.tensor_model_parallel_size = {tensor}"
    for name, size in indivisible_sizes(stage.model, tensor):
        yield f"{at}.model.{name} = {size} is not divisible by {key}; use a divisor of {size}"
    if stage.parallel.sequence_parallel and sequence_length % tensor:
        yield (
            f"{at}.data.sequence_length = {sequence_length} is not divisible by {key}, which "
            f"sequence_parallel requires; use a divisor of {sequence_length}"
        )
    yield from _context(stage, at)
    yield from _pipeline(stage, at)
    if stage.parallel.offload_optimizer and stage.parallel.zero_stage == 0:
        yield (
            f"{at}.parallel.offload_optimizer needs a sharded optimizer state, but zero_stage = 0; "
            f"set {at}.parallel.zero_stage to 1, 2 or 3"
        )
    if stage.deepspeed is not None and stage.parallel.zero_stage < 3:
        yield (
            f"{at}.deepspeed has options of ZeRO 3 only, but zero_stage = "
            f"{stage.parallel.zero_stage}; remove it, or set {at}.parallel.zero_stage to 3"
        )
    if stage.parallel.zero_hpz_partition_size > 1 and stage.parallel.zero_stage < 3:
        yield (
            f"{at}.parallel.zero_hpz_partition_size needs sharded weights, but zero_stage = "
            f"{stage.parallel.zero_stage}; set {at}.parallel.zero_stage to 3"
        )


_HEADS, _CHANNELS = ("num_attention_heads", "num_key_value_heads"), ("mamba_d_inner",)


def _context(stage: StageConfig, at: str) -> Iterator[str]:
    """Yield the problems of context parallelism."""
    parallel, model, length = stage.parallel, stage.model, stage.data.sequence_length
    ranks, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if ranks == 1:
        return
    key = f"{at}.parallel.context_parallel_size = {ranks}"
    sliced = tensor if parallel.sequence_parallel else 1
    if length % (2 * ranks) or length // ranks % sliced:
        by = f"2 x {ranks}" + (f" and {ranks} x {tensor} (sequence_parallel)" * (sliced > 1))
        multiple = math.lcm(2 * ranks, ranks * sliced)
        yield (
            f"{at}.data.sequence_length = {length} is not divisible by {by}, which {key} requires; "
            f"use a multiple of {multiple}"
        )
    if model.rope_scaling is not None and model.rope_scaling.rope_type == "dynamic":
        yield (
            f"{key} does not support {at}.model.rope_scaling.rope_type = dynamic, which depends on "
            "the longest position of a batch; use linear, llama3 or yarn"
        )
    exchanged = _CHANNELS if parallel.cp_comm_type == "all_gather" else (*_HEADS, *_CHANNELS)
    for name, size in indivisible_sizes(model, tensor * ranks):
        if name in exchanged and size % tensor == 0:
            way = "" if name in _CHANNELS else " with cp_comm_type = a2a"
            yield (
                f"{at}.model.{name} = {size} is not divisible by tensor_model_parallel_size x "
                f"context_parallel_size = {tensor} x {ranks}, which {key}{way} requires"
            )


def _pipeline(stage: StageConfig, at: str) -> Iterator[str]:
    """Yield the problems of pipeline parallelism."""
    parallel, layers = stage.parallel, stage.model.num_hidden_layers
    ranks = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    key = f"{at}.parallel.pipeline_model_parallel_size = {ranks}"
    if ranks == 1:
        if virtual > 1:
            yield (
                f"{at}.parallel.virtual_pipeline_model_parallel_size = {virtual} requires "
                "pipeline_model_parallel_size above 1, but it is 1; remove the one or set the other"
            )
        return
    if parallel.zero_stage == 3:
        yield (
            f"{key} requires zero_stage 0, 1 or 2, but {at}.parallel.zero_stage = 3 gathers the "
            "weights in every pass; use 1"
        )
    counted = int(parallel.account_for_embedding_in_pipeline_split)
    counted += int(parallel.account_for_loss_in_pipeline_split)
    if layers + counted < ranks * virtual:
        yield (
            f"{at}.model.num_hidden_layers = {layers} is less than pipeline_model_parallel_size x "
            f"virtual_pipeline_model_parallel_size = {ranks} x {virtual}; lower one of these two"
        )


def _world(stage: StageConfig, world_size: int, at: str) -> Iterator[str]:
    parallel, batch = stage.parallel, stage.batch
    data = parallel.data_parallel_size(world_size)
    if not data or world_size % data or world_size // data != parallel.model_parallel_size:
        sizes = " x ".join(
            f"{key} = {getattr(parallel, key)}"
            for key in MODEL_PARALLEL_KEYS
            if getattr(parallel, key) > 1
        )
        ranks = parallel.model_parallel_size
        yield (
            f"world size {world_size} is not divisible by {at}.parallel.{sizes}; use a multiple of "
            f"{ranks} ranks, or smaller sizes"
        )
        return
    if parallel.partition_size(world_size) % parallel.zero_hpz_partition_size:
        yield (
            f"data x context parallel {parallel.partition_size(world_size)} is not divisible by "
            f"{at}.parallel.zero_hpz_partition_size = {parallel.zero_hpz_partition_size}; use a "
            f"divisor of {parallel.partition_size(world_size)}"
        )
    micro_total = batch.micro_batch_size * data
    for size in sorted({*(batch.rampup_batch_size or ())[:2]}):
        if size % micro_total:
            yield (
                f"{at}.batch.rampup_batch_size: {size} is not divisible by micro_batch_size x data "
                f"parallel = {batch.micro_batch_size} x {data}; use multiples of {micro_total}"
            )
    if batch.global_batch_size % micro_total:
        yield (
            f"{at}.batch.global_batch_size = {batch.global_batch_size} is not divisible by "
            f"micro_batch_size x data parallel = {batch.micro_batch_size} x {data}; use a multiple "
            f"of {micro_total}"
        )
