"""Effect of changing each key of a run between a checkpoint and the run that resumes from it.

Keys have the format of `--set`, with N for an index in a list. The contents of a corpus and of the
tokenizer are compared under keys of their own, so a moved file is no change.
"""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from enum import StrEnum

from megagrow.config.data import MEASUREMENTS
from megagrow.config.deepspeed import DeepSpeedZeroConfig
from megagrow.config.model import FEATURE_KEYS, MAMBA_KEYS, RopeScaling
from megagrow.config.stage import MUON_KEYS, RATE_KEYS, KernelsConfig, ParallelConfig
from megagrow.errors import ConfigError, printable


class Effect(StrEnum):
    """Effect of a changed key on a resumed run."""

    NONE = "none"
    """Losses and weights are bit-identical."""
    ROUNDING = "rounding only"
    """Losses and weights are equal up to floating-point rounding."""
    FROM_NOW_ON = "from now on"
    """The later part of the run differs; announced, and recorded in metrics.jsonl. Retention and
    interval of checkpoints have an effect only if the run rewinds: they determine its target."""
    CONTRADICTION = "contradiction"
    """The checkpoint would not belong to the run; refused unless the user allows the key."""
    FIXED = "fixed"
    """The checkpoint is of another model or growth; always refused."""


EFFECTS: dict[Effect, tuple[str, ...]] = {
    Effect.NONE: (
        "name",
        "output_dir",
        "stages.N.data.train.N.path",
        "data.validation.N.path",
        "data.validation.NAME",
        "data.validation.NAME.N.path",
        "data.tokenizer",
        "stages.N.at_tokens",
        "stages.N.at_flops",
        "stages.N.growth.tolerance",
        "checkpoint.background",
        "stages.N.validation.interval",
        "samples",
        "samples.interval",
        "samples.prompts",
        "samples.max_tokens",
        "samples.temperature",
        "samples.top_k",
        "samples.top_p",
        "stages.N.evaluation.interval",
        "stages.N.evaluation.data_dir",
        "stages.N.evaluation.batch_size",
        "guards.hang_timeout",
        "logging.interval",
        "logging.profile",
        "logging.profile.steps",
        "logging.tensorboard",
        "logging.wandb_project",
        "logging.wandb_group",
        "logging.wandb_tags",
        "logging.peak_flops",
    ),
    Effect.ROUNDING: (
        "deterministic_mode",
        *(f"stages.N.parallel.{key}" for key in ParallelConfig.model_fields),
        *(f"stages.N.kernels.{key}" for key in KernelsConfig.model_fields),
        "stages.N.batch.micro_batch_size",
        "stages.N.deepspeed",
        *(
            f"stages.N.deepspeed.zero_optimization.{key}"
            for key in DeepSpeedZeroConfig.model_fields
        ),
    ),
    Effect.FROM_NOW_ON: (
        "precision",
        "stages.N",
        "stages.N.tokens",
        "stages.N.batch.global_batch_size",
        "stages.N.batch.rampup_batch_size",
        *(f"stages.N.optimizer.{key}" for key in dict.fromkeys((*RATE_KEYS, *MUON_KEYS))),
        "stages.N.optimizer.betas",
        "stages.N.optimizer.eps",
        "stages.N.optimizer.weight_decay",
        "stages.N.optimizer.weight_decay_on",
        "stages.N.optimizer.weight_decay_exclude",
        "stages.N.optimizer.gradient_clipping",
        "stages.N.optimizer.z_loss_multiplier",
        "stages.N.schedule.type",
        "stages.N.schedule.warmup_steps",
        "stages.N.schedule.warmup_tokens",
        "stages.N.schedule.horizon_tokens",
        "stages.N.schedule.decay_tokens",
        "stages.N.schedule.restart",
        "stages.N.growth.lr_schedule",
        "stages.N.growth.new_entries",
        "stages.N.growth.new_entries.peak_factor",
        "stages.N.growth.new_entries.warmup_steps",
        "stages.N.growth.freeze_tokens",
        "data.validation.N",
        "data.validation.N.contents",
        "data.validation.N.weight",
        "data.validation.NAME.N",
        "data.validation.NAME.N.contents",
        "data.validation.NAME.N.weight",
        "stages.N.validation.tokens",
        "stages.N.evaluation",
        "stages.N.evaluation.tasks",
        "stages.N.evaluation.limit",
        "checkpoint.interval",
        "checkpoint.keep_last",
        "checkpoint.keep_every",
        "checkpoint.keep_before_growth",
        "guards.max_skipped_steps",
        "guards.max_rewinds",
        "guards.loss_spike",
        "guards.loss_spike.window",
        "guards.loss_spike.zscore",
        "guards.loss_spike.patience",
        "guards.skip_step",
        "guards.skip_step.window",
        "guards.skip_step.sigma_factor",
    ),
    Effect.CONTRADICTION: (
        "seed",
        "init_from",
        "objective",
        "data.tokenizer_contents",
        "stages.N.data.train.N",
        "stages.N.data.train.N.contents",
        "stages.N.data.train.N.weight",
        "stages.N.data.sequence_length",
        "stages.N.data.reset_position_ids",
        "stages.N.data.reset_attention_mask",
        "stages.N.data.corpus_position",
        "stages.N.optimizer.type",
        "stages.N.model.max_position_embeddings",
        "stages.N.model.initializer_range",
        "stages.N.model.rms_norm_eps",
        "stages.N.model.sliding_window",
        "stages.N.model.rope_theta",
        "stages.N.model.rope_scaling",
        *(f"stages.N.model.rope_scaling.{key}" for key in RopeScaling.model_fields),
        "stages.N.growth",
        "stages.N.growth.layer_map",
        "stages.N.growth.new_layer_init",
        "stages.N.growth.copy_order",
        "stages.N.growth.copy_split",
        "stages.N.growth.paper_exact",
        "stages.N.growth.noise",
        "stages.N.growth.mixing_noise",
        "stages.N.growth.optimizer_state",
        "stages.N.growth.second_moment_batches",
        "stages.N.growth.exact_continuation",
        "stages.N.growth.ramp_tokens",
        "stages.N.growth.learn.steps",
        "stages.N.growth.learn.lr",
        "stages.N.growth.learn.min_lr",
        "stages.N.growth.learn.warmup_steps",
        "stages.N.growth.probe",
        "stages.N.growth.probe.operators",
        "stages.N.growth.probe.steps",
    ),
    Effect.FIXED: (
        "stages.N.model.model_type",
        "stages.N.model.num_hidden_layers",
        *(f"stages.N.model.{key}" for key in (*FEATURE_KEYS, *MAMBA_KEYS)),
        "stages.N.model.hidden_size",
        "stages.N.model.num_attention_heads",
        "stages.N.model.num_key_value_heads",
        "stages.N.model.head_dim",
        "stages.N.model.intermediate_size",
        "stages.N.model.vocab_size",
        "stages.N.model.tie_word_embeddings",
        "stages.N.growth.operator",
    ),
}
"""Keys by the effect of a change in the stage of the checkpoint, see `effect_of`.

A section that may be null, and an entry of a list, is a key itself: it can be added or removed.
"""

_EFFECT_OF = {key: effect for effect, keys in EFFECTS.items() for key in keys}

_OF_STAGE = re.compile(r"^stages\.[^.]+\.")

ALL = "all"
"""Value of `--allow-change` that allows every key."""


def check_allowed(keys: Iterable[str]) -> None:
    """Raise ConfigError for a value of `--allow-change` other than a key, a section and `all`."""
    for key in keys:
        pattern = _pattern(key)
        if not any(is_in(name, (pattern,)) for name in _EFFECT_OF):
            near = get_close_matches(pattern, _EFFECT_OF, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"--allow-change {printable(key)}: no such key{hint}")


def is_in(key: str, sections: Collection[str]) -> bool:
    """Return True if `sections` has the key, a section of it, or `all`.

    A key of a stage at the top, such as `data.sequence_length`, stands for that of all stages.
    """
    names = key, _OF_STAGE.sub("", key)
    return ALL in sections or any(
        name == each or name.startswith(f"{each}.") for each in sections for name in names
    )


def effect_of(key: str, stage: int) -> Effect:
    """Return the effect of changing a key in a run that resumes in stage `stage`.

    The values of a finished stage cannot be changed from now on, except those of its measurements,
    which have no effect any more; those of a later stage contradict nothing. Raises KeyError for a
    key without a class.
    """
    effect = _EFFECT_OF[_pattern(key)]
    if effect in (Effect.NONE, Effect.ROUNDING) or not key.startswith("stages."):
        return effect
    index = int(key.split(".")[1])
    if index > stage:
        return Effect.FROM_NOW_ON
    if index < stage and effect is Effect.FROM_NOW_ON:
        measures = key.split(".")[2] in MEASUREMENTS
        return Effect.NONE if measures else Effect.CONTRADICTION
    return effect


def _pattern(key: str) -> str:
    """Return a key with N and NAME in place of indices and names of validation sets."""
    key = re.sub(r"^(data\.validation)\.[A-Za-z][^.]*", r"\1.NAME", key)
    return re.sub(r"\.\d+(?=\.|$)", ".N", key)
