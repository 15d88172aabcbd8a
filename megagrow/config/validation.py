"""What must hold between the sections of a run. Pure: problems are returned, nothing is changed."""

from collections.abc import Iterator

from megagrow.config.schema import ModelConfig, RunConfig, StageConfig


def problems(run: RunConfig) -> list[str]:
    """All that is wrong with a run whatever the number of ranks, each in one text."""
    found = [*_instructions(run), *_evaluation(run)]
    for index, stage in enumerate(run.stages):
        at = f"stages.{index}"
        found += model_problems(stage.model, f"{at}.model")
        found += _parallel(stage, run.data.sequence_length, at)
        found += _batch_and_schedule(stage, at)
        found += _sequence(stage.model, run.data.sequence_length, at)
        found += _growth(run, index)
        found += _rate_by_size(run, index)
    return found


def world_problems(run: RunConfig, world_size: int) -> list[str]:
    """All that keeps a run from starting on `world_size` ranks, each in one text."""
    return [text for i, s in enumerate(run.stages) for text in _world(s, world_size, f"stages.{i}")]


def model_problems(model: ModelConfig, at: str) -> Iterator[str]:
    """All that is wrong with a model by itself, each in one text."""
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    own = "head_dim" in model.model_fields_set
    if not own and model.hidden_size % heads:
        yield (
            f"{at}.hidden_size = {model.hidden_size} is not a multiple of "
            f"num_attention_heads = {heads}; set head_dim or change one of them"
        )
    elif model.head_dim % 2 or not model.head_dim:
        said = "head_dim" if own else "hidden_size / num_attention_heads"
        yield (
            f"{at}: a head is {said} = {model.head_dim} wide; rotary embeddings need an even width"
        )
    rope = model.rope_scaling and model.rope_scaling.rope_type
    if rope == "dynamic" and model.head_dim == 2:
        yield f"{at}.rope_scaling: dynamic needs heads more than 2 wide"
    if rope == "yarn" and model.rope_theta <= 1:
        yield f"{at}.rope_scaling: yarn needs a rope_theta above 1, not {model.rope_theta}"
    if heads % kv_heads:
        yield (
            f"{at}.num_attention_heads = {heads} is not a multiple of "
            f"num_key_value_heads = {kv_heads}"
        )


def _instructions(run: RunConfig) -> Iterator[str]:
    if run.objective == "pretrain":
        return
    for key in ("reset_position_ids", "reset_attention_mask"):
        if not getattr(run.data, key):
            yield f"data.{key} = false: objective: sft packs examples into rows; set it to true"
    if len(run.stages) > 1:
        yield (
            "objective: sft tunes one model and grows none, but stages has "
            f"{len(run.stages)}: grow first, then begin a run with init_from"
        )


def _evaluation(run: RunConfig) -> Iterator[str]:
    if run.evaluation is not None and run.data.tokenizer is None:
        yield "evaluation turns texts into tokens: set data.tokenizer, or leave evaluation out"


def _parallel(stage: StageConfig, sequence_length: int, at: str) -> Iterator[str]:
    tensor = stage.parallel.tensor_model_parallel_size
    key = f"{at}.parallel.tensor_model_parallel_size = {tensor}"
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(stage.model, name)
        if size % tensor:
            yield f"{key} does not divide {at}.model.{name} = {size}"
    if stage.parallel.sequence_parallel and sequence_length % tensor:
        yield (
            f"{key} does not divide data.sequence_length = {sequence_length}, "
            "which sequence_parallel needs"
        )
    if stage.parallel.offload_optimizer and stage.parallel.zero_stage == 0:
        yield (
            f"{at}.parallel.offload_optimizer needs an optimizer state that is split over the "
            f"ranks: set {at}.parallel.zero_stage to 1, 2 or 3"
        )


def _batch_and_schedule(stage: StageConfig, at: str) -> Iterator[str]:
    batch, rate, schedule = stage.batch, stage.optimizer, stage.schedule
    if batch.global_batch_size % batch.micro_batch_size:
        yield (
            f"{at}.batch.global_batch_size = {batch.global_batch_size} is not a multiple of "
            f"micro_batch_size = {batch.micro_batch_size}"
        )
    if rate.min_lr > rate.lr:
        yield f"{at}.optimizer.min_lr = {rate.min_lr} is above lr = {rate.lr}"
    if schedule.warmup_steps is not None and schedule.warmup_tokens is not None:
        yield f"{at}.schedule has both warmup_steps and warmup_tokens: set one of them to null"


def _sequence(model: ModelConfig, sequence_length: int, at: str) -> Iterator[str]:
    if sequence_length > model.max_position_embeddings:
        yield (
            f"data.sequence_length = {sequence_length} is above "
            f"{at}.model.max_position_embeddings = {model.max_position_embeddings}"
        )


def _growth(run: RunConfig, index: int) -> Iterator[str]:
    at, growth = f"stages.{index}.growth", run.stages[index].growth
    if index == 0:
        if growth is not None:
            yield f"{at}: the first stage has no model to grow from; leave it out"
    elif growth is None:
        yield f"{at} is missing: say how this model comes out of that of stages.{index - 1}"


def _rate_by_size(run: RunConfig, index: int) -> Iterator[str]:
    """Where the rate follows the model's size a stage has none of its own to set."""
    growth = run.stages[index].growth
    if index == 0 or growth is None or growth.lr_schedule != "by_size":
        return
    for key in ("lr", "min_lr"):
        own, before = (getattr(run.stages[i].optimizer, key) for i in (index, index - 1))
        if own != before:
            yield (
                f"stages.{index}.optimizer.{key} = {own} has no meaning with lr_schedule by_size, "
                f"which scales the rate of stages.{index - 1}: leave {before} there, or set "
                f"stages.{index}.growth.lr_schedule to rewarm or continue"
            )


def _world(stage: StageConfig, world_size: int, at: str) -> Iterator[str]:
    tensor = stage.parallel.tensor_model_parallel_size
    if world_size % tensor:
        yield (
            f"{at}.parallel.tensor_model_parallel_size = {tensor} does not divide the "
            f"{world_size} ranks of this run"
        )
        return
    data, batch = world_size // tensor, stage.batch
    if batch.global_batch_size % (batch.micro_batch_size * data):
        yield (
            f"{at}.batch.global_batch_size = {batch.global_batch_size} is not a multiple of "
            f"micro_batch_size x data parallel = {batch.micro_batch_size} x {data}"
        )
