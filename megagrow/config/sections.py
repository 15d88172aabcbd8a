"""Base class of all sections of a run file, and the sections that a run has once."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_validator,
)

from megagrow.common.sizes import parse_count, parse_seconds
from megagrow.common.untrusted_values import LONGEST_NAME

MOST_PROFILED_STEPS = 100
"""Maximum steps of a trace: a trace of more is too large to be viewed."""

LONGEST_PATH = 4095
"""Bytes; Linux's PATH_MAX without the final zero."""

_COUNT_TEXT = r"^\s*[0-9][0-9_]*(\.[0-9]+)?([eE]\+?[0-9]+)?\s*[kKmMbBtT]?\s*$"
_CountInput = int | float | Annotated[str, Field(pattern=_COUNT_TEXT)]
Count = Annotated[
    int, BeforeValidator(parse_count, json_schema_input_type=_CountInput), Field(gt=0)
]
"""Positive integer, optionally with a suffix or an exponent: `2048`, `2M`, `10B`."""

CountOrZero = Annotated[
    int, BeforeValidator(parse_count, json_schema_input_type=_CountInput), Field(ge=0)
]
"""`Count` that may also be 0."""


_TIME_TEXT = r"^\s*[0-9]+(\.[0-9]+)?\s*(s|min|h)\s*$"


def _steps_or_time(value: object) -> object:
    """Raise ValueError, with both spellings, for a value that is no `Interval`."""
    text = str(value).strip()
    if text.endswith("m"):
        number = text.removesuffix("m").strip()
        raise ValueError(f"is ambiguous; write {number}min for minutes or {number}M for millions")
    try:
        amount = parse_seconds(text) if text.endswith(("s", "min", "h")) else parse_count(value)
    except ValueError as error:
        raise ValueError(
            "should be a number of steps such as 1000, or a time such as 90s, 30min or 2h"
        ) from error
    if amount == 0:
        raise ValueError("should be above 0")
    return value


Interval = Annotated[
    Count | Annotated[str, Field(pattern=_TIME_TEXT)], BeforeValidator(_steps_or_time)
]
"""Number of steps, or a time: `90s`, `30min`, `1.5h`."""


def _usable(path: Path) -> Path:
    """Raise ValueError for a path that no file can have."""
    text = str(path)
    if not text.isprintable():
        raise ValueError("contains a control character")
    longest = max(len(os.fsencode(part)) for part in path.parts or ("",))
    if longest > LONGEST_NAME or len(os.fsencode(text)) > LONGEST_PATH:
        raise ValueError(
            f"is longer than the file system allows: {LONGEST_NAME} bytes for a name, "
            f"{LONGEST_PATH} for a path"
        )
    return path


FilePath = Annotated[Path, AfterValidator(_usable)]
"""Path of a file or folder, printable and of a length that Linux supports."""


def _path_or_texts(value: object) -> object:
    """Raise ValueError, with both spellings, for a value that is no `PathOrTexts`."""
    if isinstance(value, str | Path) and str(value):
        return _usable(Path(value))
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return value
    raise ValueError("should be a list of texts, or the path of a file with one per line")


PathOrTexts = Annotated[
    Path | Annotated[list[str], Field(min_length=1)], BeforeValidator(_path_or_texts)
]
"""Texts, or the path of a file with one per line."""


UNNAMED_SET = "validation"
"""Name of the validation set that is given as a list."""

_SET_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*", re.ASCII)


def sets_by_name(value: Any) -> Any:
    """Return validation sets by name; a list is a single set, and an empty one none."""
    if not isinstance(value, dict):
        return {UNNAMED_SET: value} if value not in ([], ()) else {}
    if "path" in value:
        raise ValueError("should be a list of corpora, or a mapping of names to lists of corpora")
    for name in value:
        if not isinstance(name, str) or not _SET_NAME.fullmatch(name):
            rule = "use letters, digits, _ and -, starting with a letter"
            raise ValueError(f"{name!r} is not a valid name of a set; {rule}")
    return value


def sets_as_written(sets: dict[str, Any], serialize: SerializerFunctionWrapHandler) -> Any:
    """Return a single unnamed set as a list, as run files and earlier versions write it."""
    values = serialize(sets)
    return list(*values.values()) if sets.keys() <= {UNNAMED_SET} else values


class Section(BaseModel):
    """Section of a run file: frozen, and unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class CheckpointConfig(Section):
    """Checkpoint interval and retention. The end of each stage and of the run is always saved.

    They affect the result only if the run rewinds: they determine its target.
    """

    interval: Interval = 1000
    """Steps between checkpoints, or the time between them: `90s`, `30min` or `2h` of rank 0's
    clock, rounded up to complete steps."""
    keep_last: Count = 2
    """Number of most recent valid checkpoints to keep."""
    keep_every: Count | None = None
    """Steps; checkpoints at multiples of it are kept permanently."""
    keep_before_growth: bool = True
    """Keep the checkpoint before each growth permanently."""
    background: bool = True
    """Write checkpoints from a copy in host memory while training continues. The checkpoints at the
    end of a stage and of the run are written before training continues."""

    @property
    def seconds(self) -> float | None:
        """Time between checkpoints; None if `interval` is a number of steps."""
        return parse_seconds(self.interval) if isinstance(self.interval, str) else None


class ValidationConfig(Section):
    """Validation loss on `data.validation`. It is always computed at the end of each stage and of
    the run."""

    interval: Count = 500
    """Steps between validations."""
    tokens: Count = 1_000_000
    """Number of tokens from the start of each validation set, rounded to complete sequences."""


class EvaluationConfig(Section):
    """Evaluation on lm-eval tasks during training (docs/guides/evaluation.md). The model is always
    evaluated at the end of each stage and of the run. Requires lm-eval (`pip install
    megagrow[eval]`) and `data.tokenizer`."""

    interval: Count = 1000
    """Steps between evaluations."""
    tasks: list[str] = Field(default=["gstack"], min_length=1)
    """Names of lm-eval tasks; `gstack` is the group of the paper's eight tasks."""
    data_dir: FilePath | None = None
    """Directory with local files of the tasks. By default, they are downloaded from the Hugging
    Face Hub."""
    limit: Count | None = None
    """Maximum number of documents per task; null evaluates all."""
    batch_size: Count = 16
    """Sequences per forward pass of each data-parallel rank."""


class SamplesConfig(Section):
    """Texts that the model generates during training and at the end of each stage. They are logged
    and recorded. Requires `data.tokenizer` and transformers (`pip install megagrow[hf]`)."""

    interval: Count | None = None
    """Steps between samples; null: `validation.interval`."""
    prompts: PathOrTexts
    """Texts to continue, or a text file with one per line. A text may be empty."""
    max_tokens: Count = 64
    """Maximum number of generated tokens per prompt."""
    temperature: float = Field(default=0.8, ge=0)
    """Divisor of the logits; 0 takes the most likely token. The random numbers of a prompt are the
    same each time."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the K most likely tokens; 0 samples from all."""
    top_p: float = Field(default=1.0, ge=0, le=1)
    """Sample from the most likely tokens that together have this probability."""


class LossSpikeConfig(Section):
    """Detection of loss spikes: the loss exceeds the mean of the last `window` losses by `zscore`
    standard deviations in `patience` consecutive steps."""

    window: int = Field(default=100, ge=2)
    """Steps in the reference window. Losses above the threshold do not enter it; a growth clears
    it."""
    zscore: float = Field(default=6.0, gt=0)
    """Threshold, in standard deviations above the mean."""
    patience: Count = 3
    """Consecutive steps above the threshold that make a spike."""


class SkipStepConfig(Section):
    """Steps whose loss or gradient norm exceeds the mean of the last `window` steps by
    `sigma_factor` standard deviations update nothing, as with OLMo-core's `SkipStepOptimizer`."""

    window: int = Field(default=128, ge=4)
    """Steps in the reference window, skipped ones included. No step is skipped before half of it
    is filled; a growth clears it."""
    sigma_factor: float = Field(default=6.0, gt=0)
    """Threshold, in standard deviations above the mean."""


class GuardsConfig(Section):
    """Response to non-finite steps, loss spikes and hung ranks (docs/guides/fault-tolerance.md)."""

    max_skipped_steps: Count = 3
    """Consecutive steps with a non-finite loss or gradient after which the run rewinds to a
    checkpoint."""
    max_rewinds: int = Field(default=3, ge=0)
    """Rewinds to the same or an earlier checkpoint after which the run fails."""
    loss_spike: LossSpikeConfig | None = None
    """Rewind after a loss spike; null disables the detection."""
    skip_step: SkipStepConfig | None = None
    """Skip single steps with an outlier of loss or gradient norm; null disables it. Their tokens
    count as trained, and they are no failures in the sense of `max_skipped_steps`."""
    hang_timeout: float | None = Field(default=600.0, ge=1)
    """Seconds without progress of a rank after which all ranks are aborted; null disables the
    watchdog. Long operations (a growth, a checkpoint, the first step of a stage) get six times as
    long."""


class ProfileConfig(Section):
    """Trace of training steps by torch's profiler on rank 0, written to profile/ in `output_dir`.
    View it at https://ui.perfetto.dev or in chrome://tracing."""

    steps: tuple[Count, Count]
    """First and last step of the trace, such as `[10, 12]`. Profiled steps are slower."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        first, last = self.steps
        if not first <= last < first + MOST_PROFILED_STEPS:
            raise ValueError(
                f"steps should be the first and the last of at most {MOST_PROFILED_STEPS} steps, "
                "such as [10, 12]"
            )
        return self

    @property
    def range(self) -> range:
        """The profiled steps."""
        first, last = self.steps
        return range(first, last + 1)


class LoggingConfig(Section):
    """Outputs of metrics, in addition to metrics.jsonl, which is always written."""

    interval: Count = 1
    """Steps between training records."""
    tensorboard: bool = True
    """Write TensorBoard events to tensorboard/ in `output_dir`."""
    wandb_project: str | None = None
    """Weights & Biases project to log to; requires the extra `wandb`."""
    wandb_group: str | None = None
    """Group of the W&B run, such as the name of a sweep."""
    wandb_tags: list[str] = []
    """Tags of the W&B run."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Peak FLOP/s of one device, for the model FLOPs utilization (MFU). Known for common GPUs."""
    profile: ProfileConfig | None = None
    """Trace of some steps, `{steps: [10, 12]}`; null disables it."""
