"""What a run is: every key that a run file may hold, its meaning and its default.

Names are those that a Megatron, DeepSpeed or Hugging Face user expects. Checks within one section
stand here; checks across sections, and against the number of ranks, stand in `checks.py`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megagrow.config.evaluation import EvaluationConfig
from megagrow.config.growth import GrowthConfig
from megagrow.config.guards import GuardsConfig
from megagrow.config.kernels import KernelsConfig
from megagrow.config.rope import RopeScaling
from megagrow.config.section import Count, Section


class ModelConfig(Section):
    """A Llama-type model, with the field names of Hugging Face's LlamaConfig."""

    num_hidden_layers: Annotated[Count, Field(le=10_000)]
    """Every layer has a place in tables that are made whole."""
    hidden_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count = Field(default_factory=lambda seen: seen["num_attention_heads"])
    head_dim: Count = Field(
        default_factory=lambda seen: seen["hidden_size"] // seen["num_attention_heads"]
    )
    intermediate_size: Count
    vocab_size: Count
    max_position_embeddings: Count = 2048
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    """For sequences longer than those that a model was first trained on."""
    rms_norm_eps: float = Field(default=1e-5, ge=0)
    tie_word_embeddings: bool = False
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of every matrix at the start; o_proj and down_proj get it divided by
    sqrt(2 num_hidden_layers), as in Megatron-LM."""


class CorpusConfig(Section):
    """One tokenised corpus: the common prefix of its .bin and .idx files, and its share."""

    path: Path
    weight: float = Field(default=1.0, gt=0)


class DataConfig(Section):
    """What the run reads. Each token of a corpus is read once per epoch."""

    train: list[CorpusConfig] = Field(min_length=1)
    validation: list[CorpusConfig] = Field(default=[])
    tokenizer: Path | None = None
    """Only checked against the model's vocabulary and kept with the checkpoints."""
    sequence_length: Count
    reset_position_ids: bool = False
    """Positions start again at 0 with each document (Megatron-LM's name)."""
    reset_attention_mask: bool = False
    """A token sees only its own document (Megatron-LM's name)."""


class ParallelConfig(Section):
    """How a stage is spread over the ranks: world = data parallel x tensor parallel."""

    tensor_model_parallel_size: Count = 1
    sequence_parallel: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    """Keeps fp32 weights and moments in the CPU's memory and updates them there; from ZeRO 1 on."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"


class BatchConfig(Section):
    """Sizes in sequences; accumulation steps follow: global / (micro x data parallel)."""

    global_batch_size: Count
    micro_batch_size: Count


class OptimizerConfig(Section):
    """AdamW. The defaults are those of the paper's code (tongxuluo/prts)."""

    lr: float = Field(gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    weight_decay_on: Literal["all", "matrices"] = "all"
    """`matrices` leaves the norms out, in an optimizer group of their own."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Global norm to which gradients are clipped; 0 turns clipping off."""


class ScheduleConfig(Section):
    """The learning rate as a function of tokens, counted from where the schedule started.

    Warm-up is given in steps or in tokens, not both. `horizon_tokens` is where cosine and linear
    reach `min_lr`, and where WSD ends; by default the end of the whole run. `decay_tokens` is the
    length of WSD's final decay, by default a tenth of the horizon.
    """

    type: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_tokens: Count | None = None
    horizon_tokens: Count | None = None
    decay_tokens: Count | None = None


class StageConfig(Section):
    """One model, trained for a number of tokens."""

    model: ModelConfig
    tokens: Count
    """Tokens trained in this stage; rounded up to whole steps. A run file gives one of `tokens`,
    `at_tokens` and `at_flops`: where it is not `tokens`, that follows (see `lengths.py`)."""
    at_tokens: Count | None = None
    """Tokens of the whole run at which this stage ends."""
    at_flops: Count | None = None
    """FLOPs of the whole run, 6 x parameters x tokens, at which this stage ends."""
    tokens_auto: bool = Field(default=False, exclude=True)
    """Whether the run file says `tokens: auto`; no key of its own. `tokens` then follows from
    equation 2 of the paper (see `timing.py`) and the stage after this one."""
    growth: GrowthConfig | None = None
    """Absent in the first stage, present in all others."""
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelsConfig = KernelsConfig()
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()


class CheckpointConfig(Section):
    """When the state is saved, and what is kept. The end of a stage and of the run are always
    saved."""

    interval: Count = 1000
    """In steps."""
    keep_last: Count = 2
    """So many of the newest whole ones."""
    keep_every: Count | None = None
    """In steps: checkpoints whose step is a multiple are kept for ever."""
    keep_before_growth: bool = True
    """The checkpoint before each growth is kept for ever."""
    background: bool = True
    """Writes while the training goes on, from a copy of the state in host memory. The end of a
    stage and of the run are waited for."""


class ValidationConfig(Section):
    """When the validation loss is measured. The end of a stage and of the run always are."""

    interval: Count = 500
    """In steps."""
    tokens: Count = 1_000_000
    """Measured on the first so many tokens of the validation corpus (rounded to sequences)."""


class LoggingConfig(Section):
    """Metrics always go to metrics.jsonl; the rest is asked for here."""

    interval: Count = 1
    """In steps."""
    tensorboard: bool = True
    wandb_project: str | None = None
    peak_flops: float | None = Field(default=None, gt=0)
    """Peak FLOP/s of one device, for the model FLOPs utilisation; known for common GPUs."""


class RunConfig(Section):
    """A whole run. Keys of a stage but `growth` may also be written at the top of the file:
    there they are the defaults of every stage (see `load.py`)."""

    name: str
    seed: int = 1234
    output_dir: Path
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 on a GPU and fp32 on a CPU. Master weights and moments are always fp32."""
    init_from: Path | None = None
    """A checkpoint, a run or a Hugging Face folder, of whose weights the first stage's model is
    made; None is initial weights. Not looked at once the run has a checkpoint of its own."""
    stage: Literal["pretrain", "sft"] = "pretrain"
    """`sft` is instruction tuning, on data of `megagrow prepare-sft`: the loss is the mean over the
    answers' tokens of a global batch, and the optimizer begins anew whatever `init_from` holds."""
    data: DataConfig
    stages: list[StageConfig] = Field(min_length=1)
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig | None = None
    """Without it there is none."""
    guards: GuardsConfig = GuardsConfig()
    logging: LoggingConfig = LoggingConfig()
