"""Constraints between the sections of a run. Problems are returned as one-line texts."""

from collections.abc import Iterator
from fnmatch import filter as filter_names

from megagrow.config.model import MAMBA_KEYS, WEIGHTLESS_KEYS, ModelConfig
from megagrow.config.parallel_rules import parallel_problems
from megagrow.config.schema import RunConfig
from megagrow.config.stage import MUON_KEYS, RATE_KEYS, BatchConfig, OptimizerConfig, StageConfig
from megagrow.model.layers.table import model_parameters


def problems(run: RunConfig) -> list[str]:
    """Return all problems of a run that do not depend on the number of ranks."""
    texts = [*_instruction_tuning(run), *_evaluation(run), *_checkpoint(run)]
    for index, stage in enumerate(run.stages):
        at = f"stages.{index}"
        texts += model_problems(stage.model, f"{at}.model")
        texts += parallel_problems(stage, at)
        texts += _batch_and_schedule(stage, at)
        texts += _optimizer(stage.optimizer, f"{at}.optimizer")
        texts += _excluded(run, stage, f"{at}.optimizer.weight_decay_exclude")
        texts += _sequence(stage, at)
        texts += _growth(run, index)
        texts += _rate_by_size(run, index)
    return texts


def model_problems(model: ModelConfig, at: str) -> Iterator[str]:
    """Yield all problems of a single model, whose section is at the path `at`."""
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    is_set = "head_dim" in model.model_fields_set
    if not is_set and model.hidden_size % heads:
        yield (
            f"{at}.hidden_size = {model.hidden_size} is not divisible by "
            f"num_attention_heads = {heads}; set head_dim or change one of them"
        )
    elif model.head_dim % 2 or not model.head_dim:
        key = "head_dim" if is_set else "hidden_size / num_attention_heads"
        yield f"{at}: {key} = {model.head_dim} is not even; rotary embeddings need an even head_dim"
    rope = model.rope_scaling and model.rope_scaling.rope_type
    if rope == "dynamic" and model.head_dim == 2:
        yield f"{at}.head_dim = 2 is too small for rope_scaling dynamic; use 4 or more"
    if rope == "yarn" and model.rope_theta <= 1:
        yield f"{at}.rope_theta = {model.rope_theta} must be above 1 for rope_scaling yarn"
    if heads % kv_heads:
        yield (
            f"{at}.num_attention_heads = {heads} is not divisible by "
            f"num_key_value_heads = {kv_heads}; use a divisor of {heads}"
        )
    yield from _layer_type_problems(model, at)


def _layer_type_problems(model: ModelConfig, at: str) -> Iterator[str]:
    """Yield the problems of keys that only some layer types use."""
    window, slides = model.sliding_window, "sliding_attention" in model.layer_types
    if slides and window is None:
        yield f"{at}.layer_types contains sliding_attention; set sliding_window to its tokens"
    if window is not None and not slides:
        yield (
            f"{at}.sliding_window = {window}, but layer_types has no sliding_attention; remove it "
            "or add layers of this type"
        )
    if window is not None and window > model.max_position_embeddings:
        yield (
            f"{at}.sliding_window = {window} exceeds max_position_embeddings = "
            f"{model.max_position_embeddings}; use at most the context length"
        )
    for key in MAMBA_KEYS:
        value, needed = getattr(model, key), "mamba" in model.layer_types
        if value is None and needed:
            yield f"{at}.{key} = null, but layer_types contains mamba; set it or remove the key"
        if value is not None and not needed:
            yield f"{at}.{key} = {value}, but layer_types has no mamba; remove it"


def _instruction_tuning(run: RunConfig) -> Iterator[str]:
    if run.objective == "pretrain":
        return
    for key in ("reset_position_ids", "reset_attention_mask"):
        if not getattr(run.stages[0].data, key):
            yield (
                f"data.{key} = false, but objective: sft packs independent examples into one "
                f"sequence; set data.{key}: true"
            )
    if len(run.stages) > 1:
        yield (
            f"objective: sft needs exactly one stage, but stages has {len(run.stages)}; grow "
            "first, then start a run with init_from"
        )


def _evaluation(run: RunConfig) -> Iterator[str]:
    evaluated = any(stage.evaluation is not None for stage in run.stages)
    for name, used in (("samples", run.samples is not None), ("evaluation", evaluated)):
        if used and run.data.tokenizer is None:
            yield f"{name} needs a tokenizer; set data.tokenizer or remove {name}"


def _batch_and_schedule(stage: StageConfig, at: str) -> Iterator[str]:
    batch, schedule = stage.batch, stage.schedule
    if batch.global_batch_size % batch.micro_batch_size:
        yield (
            f"{at}.batch.global_batch_size = {batch.global_batch_size} is not divisible by "
            f"micro_batch_size = {batch.micro_batch_size}; use a divisor of "
            f"{batch.global_batch_size}"
        )
    yield from _batch_ramp(batch, f"{at}.batch")
    if schedule.warmup_steps is not None and schedule.warmup_tokens is not None:
        yield f"{at}.schedule sets both warmup_steps and warmup_tokens; set one of them to null"


def _batch_ramp(batch: BatchConfig, at: str) -> Iterator[str]:
    if batch.rampup_batch_size is None:
        return
    start, increment, _ = batch.rampup_batch_size
    key = f"{at}.rampup_batch_size = {list(batch.rampup_batch_size)}"
    if start >= batch.global_batch_size or (batch.global_batch_size - start) % increment:
        yield (
            f"{key} does not lead from {start} to global_batch_size = {batch.global_batch_size} in "
            f"increments of {increment}; use a smaller start and a divisor of the difference"
        )
    for size in sorted({start, increment}):
        if size % batch.micro_batch_size:
            yield (
                f"{key}: {size} is not divisible by micro_batch_size = {batch.micro_batch_size}; "
                f"use multiples of {batch.micro_batch_size}"
            )


def _optimizer(optimizer: OptimizerConfig, at: str) -> Iterator[str]:
    for key in MUON_KEYS:
        value = getattr(optimizer, key)
        if optimizer.type != "muon" and value != OptimizerConfig.model_fields[key].default:
            yield (
                f"{at}.{key} = {value} is a key of Muon, but {at}.type = {optimizer.type}; remove "
                "it or set type: muon"
            )
    for prefix in ("", "adamw_", "decoupled_"):
        peak, final = (getattr(optimizer, f"{prefix}{key}") for key in ("lr", "min_lr"))
        if peak is None:
            if final is not None:
                yield f"{at}.{prefix}min_lr = {final} has no {prefix}lr; set it or remove the key"
            continue
        used = "min_lr" if final is None else f"{prefix}min_lr"
        lowest = optimizer.min_lr if final is None else final
        if lowest > peak:
            yield f"{at}.{used} = {lowest} is above {prefix}lr = {peak}; use at most {prefix}lr"


def _excluded(run: RunConfig, stage: StageConfig, at: str) -> Iterator[str]:
    """Yield patterns without a match in any stage; a base may lack the layers that one names."""
    patterns = stage.optimizer.weight_decay_exclude
    stages = run.stages if patterns else ()
    names = [each.name for other in stages for each in model_parameters(other.model)]
    for pattern in patterns:
        if not filter_names(names, pattern):
            yield (
                f"{at}: {pattern} matches no parameter of any stage; use a pattern of names such "
                f"as {names[1]}"
            )


def _sequence(stage: StageConfig, at: str) -> Iterator[str]:
    length, longest = stage.data.sequence_length, stage.model.max_position_embeddings
    if length > longest:
        yield (
            f"{at}.data.sequence_length = {length} is above "
            f"{at}.model.max_position_embeddings = {longest}; lower the one or raise the other"
        )


def _checkpoint(run: RunConfig) -> Iterator[str]:
    if run.checkpoint.seconds is not None and run.checkpoint.keep_every is not None:
        yield (
            f"checkpoint.keep_every = {run.checkpoint.keep_every} keeps multiples of a number of "
            f"steps, but checkpoint.interval = {run.checkpoint.interval} is a time; set "
            "checkpoint.interval to a number of steps or remove checkpoint.keep_every"
        )


def _growth(run: RunConfig, index: int) -> Iterator[str]:
    at, growth = f"stages.{index}.growth", run.stages[index].growth
    if index == 0:
        if growth is not None:
            yield f"{at}: the first stage has no model to grow from; remove it"
    elif growth is None:
        yield from _kept_model(run, index)
    if growth is not None and run.stages[index].schedule.restart:
        yield (
            f"stages.{index}.schedule.restart = true is for stages without growth; remove it and "
            f"set {at}.lr_schedule to rewarm"
        )


def _kept_model(run: RunConfig, index: int) -> Iterator[str]:
    """Yield the changes of a model that its weights do not allow without a growth."""
    at, (old, new) = f"stages.{index}", (run.stages[i].model for i in (index - 1, index))
    for key in ModelConfig.model_fields:
        before, after = getattr(old, key), getattr(new, key)
        if before != after and key not in WEIGHTLESS_KEYS:
            yield (
                f"{at}.model changes {key} from {before} to {after}; add {at}.growth, or set "
                f"{at}.model.{key} to the value of stages.{index - 1}"
            )


def _rate_by_size(run: RunConfig, index: int) -> Iterator[str]:
    """Yield learning rates that `by_size`, which scales the previous stage's rate, would ignore."""
    growth = run.stages[index].growth
    if index == 0 or growth is None or growth.lr_schedule != "by_size":
        return
    for key in RATE_KEYS:
        own, before = (getattr(run.stages[i].optimizer, key) for i in (index, index - 1))
        if own != before:
            yield (
                f"stages.{index}.optimizer.{key} = {own} differs from "
                f"stages.{index - 1}.optimizer.{key} = {before}, which lr_schedule by_size scales; "
                f"use {before}, or set stages.{index}.growth.lr_schedule to rewarm or continue"
            )
