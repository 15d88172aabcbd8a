"""What a run is: every key that a run file may hold, its meaning and its default.

Names are those that a Megatron, DeepSpeed or Hugging Face user expects. Checks within one section
stand here; checks across sections, and against the number of ranks, stand in `checks.py`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megagrow.config.growth import GrowthConfig
from megagrow.config.sections import (
    Count,
    EvaluationConfig,
    GuardsConfig,
    KernelsConfig,
    RopeScaling,
    Section,
)


class ModelConfig(Section):
    """A Llama-type model, with the field names of Hugging Face's LlamaConfig."""

    num_hidden_layers: Annotated[Count, Field(le=10_000)]
    """Depth. Every layer has a place in tables that are made whole, hence the limit."""
    hidden_size: Count
    """Width of the residual stream."""
    num_attention_heads: Count
    """Query heads of a layer; a multiple of `num_key_value_heads`."""
    num_key_value_heads: Count = Field(default_factory=lambda seen: seen["num_attention_heads"])
    """Fewer than `num_attention_heads` is grouped-query attention, 1 is multi-query; by default
    `num_attention_heads`."""
    head_dim: Count = Field(
        default_factory=lambda seen: seen["hidden_size"] // seen["num_attention_heads"]
    )
    """Width of a head, even; by default `hidden_size` / `num_attention_heads`."""
    intermediate_size: Count
    """Width of the feed-forward layers (SwiGLU: three matrices)."""
    vocab_size: Count
    """Rows of the embedding and of the head; at least the tokenizer's, padding is made inside."""
    max_position_embeddings: Count = 2048
    """The longest sequence, in tokens."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """For sequences longer than those that a model was first trained on."""
    rms_norm_eps: float = Field(default=1e-5, ge=0)
    """Added to the mean square in every RMSNorm."""
    tie_word_embeddings: bool = False
    """Whether the head is the embedding, one table for both."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of every matrix at the start; o_proj and down_proj get it divided by
    sqrt(2 num_hidden_layers), as in Megatron-LM."""


class CorpusConfig(Section):
    """One tokenised corpus: the common prefix of its .bin and .idx files, and its share."""

    path: Path
    """The files' path without .bin and .idx."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the blend, relative to the other corpora's."""


class DataConfig(Section):
    """What the run reads. Each token of a corpus is read once per epoch."""

    train: list[CorpusConfig] = Field(min_length=1)
    """What is trained on; more than one is blended."""
    validation: list[CorpusConfig] = Field(default=[])
    """What the validation loss is measured on; without any there is none."""
    tokenizer: Path | None = None
    """A SentencePiece .model, a tokenizer.json or a Hugging Face folder: checked against the
    model's vocabulary, kept with the checkpoints, and needed by `evaluation`."""
    sequence_length: Count
    """Tokens of a sequence."""
    reset_position_ids: bool = False
    """Positions start again at 0 with each document (Megatron-LM's name)."""
    reset_attention_mask: bool = False
    """A token sees only its own document (Megatron-LM's name)."""


class ParallelConfig(Section):
    """How a stage is spread over the ranks: world = data parallel x tensor parallel."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each matrix; divides the heads, the feed-forward width and the ranks."""
    sequence_parallel: bool = False
    """Splits what lies between the matrices along the sequence, over the tensor-parallel ranks."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What the data-parallel ranks split: 0 nothing, 1 the optimizer state, 2 gradients too, 3
    weights too."""
    offload_optimizer: bool = False
    """Keeps fp32 weights and moments in the CPU's memory and updates them there; from ZeRO 1 on."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What is computed again in the backward pass in place of being kept: `selective` the core
    of attention, `full` whole layers."""


class BatchConfig(Section):
    """Sizes in sequences; accumulation steps follow: global / (micro x data parallel)."""

    global_batch_size: Count
    """Sequences of a step, over all ranks."""
    micro_batch_size: Count
    """Sequences of a forward pass of one data-parallel rank."""


class OptimizerConfig(Section):
    """AdamW, by default with the values of the paper's code (tongxuluo/prts)."""

    lr: float = Field(gt=0)
    """The highest learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """What the schedule falls to; not above `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and of the second moment in a step."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled: a step takes lr x weight_decay of each weight."""
    weight_decay_on: Literal["all", "matrices"] = "all"
    """What decays: `matrices` leaves the norms out, in an optimizer group of their own."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Global norm to which gradients are clipped; 0 turns clipping off."""


class ScheduleConfig(Section):
    """The learning rate as a function of tokens, counted from where the schedule started.

    Warm-up is given in steps or in tokens, not both.
    """

    type: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """The way from `lr` down to `min_lr`; `wsd` is warm-up, stable, decay."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps in which the rate rises from 0 to `lr`."""
    warmup_tokens: Count | None = None
    """The same in tokens."""
    horizon_tokens: Count | None = None
    """Tokens at which cosine and linear reach `min_lr`, and WSD ends; by default the end of the
    whole run."""
    decay_tokens: Count | None = None
    """Tokens of WSD's final decay; by default a tenth of the horizon."""


class StageConfig(Section):
    """One model, trained for a number of tokens."""

    model: ModelConfig
    tokens: Count
    """Tokens trained in this stage, rounded up to whole steps; `auto` takes what equation 2 of the
    paper advises for the stage after it. A run file gives one of `tokens`, `at_tokens` and
    `at_flops`: where it is not `tokens`, that follows."""
    at_tokens: Count | None = None
    """Tokens of the whole run at which this stage ends."""
    at_flops: Count | None = None
    """FLOPs of the whole run, 6 x parameters x tokens, at which this stage ends."""
    tokens_auto: bool = Field(default=False, exclude=True)
    """Whether the run file says `tokens: auto`; no key of its own. `tokens` then follows from
    equation 2 of the paper (see `timing.py`) and the stage after this one."""
    growth: GrowthConfig | None = None
    """How this model comes out of that of the stage before: absent in the first stage, present in
    all others."""
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelsConfig = KernelsConfig()
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()


class CheckpointConfig(Section):
    """When the state is saved, and what is kept. The end of a stage and of the run are always
    saved."""

    interval: Count = 1000
    """Steps from one checkpoint to the next."""
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
    """Steps from one validation to the next."""
    tokens: Count = 1_000_000
    """Measured on the first so many tokens of the validation corpus (rounded to sequences)."""


class LoggingConfig(Section):
    """Metrics always go to metrics.jsonl; the rest is asked for here."""

    interval: Count = 1
    """Steps from one record of training to the next."""
    tensorboard: bool = True
    """Writes them for TensorBoard too, in the run's tensorboard/."""
    wandb_project: str | None = None
    """The project at Weights & Biases to which they go too; needs the extra `wandb`."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Peak FLOP/s of one device, for the model FLOPs utilisation; known for common GPUs."""


class RunConfig(Section):
    """A whole run. Keys of a stage but `growth` may also be written at the top of the file:
    there they are the defaults of every stage."""

    name: str
    """What the run is called in its output, in reports and in trackers."""
    seed: int = 1234
    """Decides initial weights, the order of the data, and what growth draws at random."""
    output_dir: Path
    """The run's directory: config, metrics, checkpoints. A run goes on from what is in it."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 on a GPU and fp32 on a CPU. Master weights and moments are always fp32."""
    init_from: Path | None = None
    """A checkpoint, a run or a Hugging Face folder, of whose weights the first stage's model is
    made; null is initial weights. Not looked at once the run has a checkpoint of its own."""
    objective: Literal["pretrain", "sft"] = "pretrain"
    """`sft` is instruction tuning, on data of `megagrow prepare-sft`: the loss is the mean over the
    answers' tokens of a global batch, and the optimizer begins anew whatever `init_from` holds."""
    data: DataConfig
    stages: list[StageConfig] = Field(min_length=1)
    """One after the other, each grown out of the one before. Without `stages` the top of the file
    is the only stage."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig | None = None
    """Evaluation on lm-eval's tasks while the run trains; null is none."""
    guards: GuardsConfig = GuardsConfig()
    logging: LoggingConfig = LoggingConfig()
