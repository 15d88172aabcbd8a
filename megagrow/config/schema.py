"""Schema of a run file: `RunConfig`, with all its keys, their meanings and defaults.

Names are those familiar from Megatron-LM, DeepSpeed and Hugging Face. Constraints within one
section are validated by its class, constraints between sections and with the number of ranks in
`validation.py`. The sections of a run and of a stage can be imported from here.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from megagrow.config.data import CorpusConfig, DataConfig, StageDataConfig, with_stage_defaults
from megagrow.config.growth import GrowthConfig
from megagrow.config.model import ModelConfig
from megagrow.config.sections import (
    CheckpointConfig,
    EvaluationConfig,
    FilePath,
    GuardsConfig,
    LoggingConfig,
    SamplesConfig,
    Section,
    ValidationConfig,
)
from megagrow.config.stage import (
    BatchConfig,
    KernelsConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    StageConfig,
)

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "CorpusConfig",
    "DataConfig",
    "EvaluationConfig",
    "GrowthConfig",
    "GuardsConfig",
    "KernelsConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "SamplesConfig",
    "ScheduleConfig",
    "StageConfig",
    "StageDataConfig",
    "ValidationConfig",
]


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("contains a line break or another control character")
    return name


def _in_64_bits(seed: int) -> int:
    if not -(2**63) <= seed < 2**63:
        raise ValueError("does not fit into 64 bits")
    return seed


class RunConfig(Section):
    """A run. Keys of a stage except `growth` may also be set at the top of the file, as defaults of
    all stages."""

    name: Annotated[str, Field(max_length=200), AfterValidator(_printable)]
    """Name of the run in its output, in reports and in trackers; printable."""
    seed: Annotated[int, AfterValidator(_in_64_bits)] = 1234
    """Seed of the initial weights, the data order, and the random numbers of growth."""
    output_dir: FilePath
    """Directory of the run: configuration, metrics, checkpoints. A run resumes from its latest
    checkpoint there."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision; `auto` is bf16 on a GPU and fp32 on a CPU. Master weights and moments are
    always fp32. With `zero_stage: 0`, bf16 is an autocast of fp32 weights."""
    deterministic_mode: bool = False
    """Compute the same bits in every run on the same GPUs and layout, with slower kernels (name
    from Megatron-LM). CPUs always do (docs/guides/kernels.md#determinism)."""
    init_from: FilePath | None = None
    """Checkpoint, run directory or Hugging Face folder with the initial weights of the first stage;
    null initializes randomly. Not read when resuming."""
    objective: Literal["pretrain", "sft"] = "pretrain"
    """`sft` is instruction tuning on data from `megagrow prepare-sft`: the loss is the mean over
    the answer tokens of a global batch, and the optimizer state is always reinitialized."""
    data: DataConfig = DataConfig()
    stages: list[StageConfig] = Field(min_length=1)
    """Stages in order; each one continues or grows the model of the previous one. Without `stages`,
    the top of the file is the only stage."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig | None = None
    """Texts generated during training; null disables them."""
    guards: GuardsConfig = GuardsConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="before")
    @classmethod
    def _with_stage_defaults(cls, values: Any) -> Any:
        return with_stage_defaults(values) if isinstance(values, Mapping) else values
