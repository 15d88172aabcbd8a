"""Sections of a stage: parallelism, kernels, batch, optimizer, schedule, and the stage itself."""

from math import prod
from typing import Any, Literal

from pydantic import Field, model_validator

from megagrow.config.data import StageDataConfig
from megagrow.config.deepspeed import DeepSpeedConfig
from megagrow.config.growth import GrowthConfig
from megagrow.config.model import ModelConfig
from megagrow.config.sections import Count, EvaluationConfig, Section, ValidationConfig

RowBackend = Literal["auto", "triton", "torch"]


def format_layout(zero_stage: int, dp: int, tp: int, cp: int = 1, pp: int = 1) -> str:
    """Return the layout of a stage as text: `ZeRO 1, DP 8 x TP 2`, or with all sizes
    `ZeRO 1, DP 8 x CP 2 x PP 4 x TP 2`."""
    others = "".join(f" x {name} {size}" for name, size in (("CP", cp), ("PP", pp)) if size > 1)
    return f"ZeRO {zero_stage}, DP {dp}{others} x TP {tp}"


MODEL_PARALLEL_KEYS = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
)
"""Keys of `ParallelConfig` whose product divides the world size."""


class ParallelConfig(Section):
    """Parallelism of a stage: world size = data x context x pipeline x tensor parallel."""

    tensor_model_parallel_size: Count = 1
    """Tensor-parallel ranks; a divisor of the heads, of the feed-forward width and of the world
    size."""
    sequence_parallel: bool = False
    """Shard activations between the matrices along the sequence over the tensor-parallel ranks."""
    context_parallel_size: Count = 1
    """Ranks that share the sequences of a micro-batch; twice the size must divide the sequence
    length. ZeRO shards the state over data x context parallel ranks."""
    cp_comm_type: Literal["all_gather", "a2a"] = "all_gather"
    """Communication of attention under context parallelism (name from Megatron-LM): `all_gather`
    gathers keys and values; `a2a` exchanges sequence shards for heads (DeepSpeed-Ulysses), whose
    number per tensor-parallel rank must be divisible by `context_parallel_size`."""
    pipeline_model_parallel_size: Count = 1
    """Ranks between which the layers are divided; requires `zero_stage` 0, 1 or 2."""
    virtual_pipeline_model_parallel_size: Count = 1
    """Chunks of consecutive layers of each pipeline rank: 1 selects the 1F1B schedule, more the
    interleaved one."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer of the first chunk (name from Megatron-LM). Without
    pipeline parallelism it has no effect."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the head and the loss as a layer of the last chunk (name from Megatron-LM). Without
    pipeline parallelism it has no effect."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """State sharded over the data-parallel ranks: 0 none, 1 optimizer state, 2 also gradients, 3
    also weights."""
    offload_optimizer: bool = False
    """Keep fp32 weights and moments in CPU memory and update them there; requires `zero_stage` 1 or
    higher."""
    communication_data_type: Literal["fp32", "bf16"] = "fp32"
    """Data type in which gradients are summed over the data-parallel ranks. `bf16` halves the
    bytes and rounds every partial sum."""
    zero_hpz_partition_size: Count = 1
    """Ranks over which ZeRO 3 shards a second copy of the forward weights between the first forward
    pass of a step and the update (hpZ of ZeRO++): all other passes gather from these ranks only. A
    divisor of the data-parallel size, at most the ranks of a host; 1 disables it."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: `selective` the outputs of norms and the product
    of SwiGLU, which repeats no matrix product (only SwiGLU with `norm_position: post`, where no
    matrix product reads a norm); `full` entire layers."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that process the same sequences: tensor x context x pipeline parallel."""
        return prod(getattr(self, key) for key in MODEL_PARALLEL_KEYS)

    @property
    def is_pipeline(self) -> bool:
        """True if the layers are divided between ranks."""
        return self.pipeline_model_parallel_size > 1

    def data_parallel_size(self, world_size: int) -> int:
        """Return the ranks with different sequences: world size / (tensor x context x pipeline)."""
        return world_size // self.model_parallel_size

    def partition_size(self, world_size: int) -> int:
        """Return the ranks over which ZeRO shards the state: data x context parallel."""
        return self.data_parallel_size(world_size) * self.context_parallel_size

    def layout_sizes(self, world_size: int) -> dict[str, int]:
        """Return ZeRO stage and parallel sizes by the names of `format_layout`."""
        return {
            "zero_stage": self.zero_stage,
            "dp": self.data_parallel_size(world_size),
            "tp": self.tensor_model_parallel_size,
            "cp": self.context_parallel_size,
            "pp": self.pipeline_model_parallel_size,
        }

    def layout_text(self, world_size: int) -> str:
        """Return `format_layout` of these settings."""
        return format_layout(**self.layout_sizes(world_size))

    @property
    def communication_bytes(self) -> int:
        """Bytes of a gradient element in `communication_data_type`."""
        return 2 if self.communication_data_type == "bf16" else 4


class KernelsConfig(Section):
    """Backend of each operation. `auto` is the fastest one that computes correctly on the device. A
    named backend that is not available is an error before the run starts. `megagrow doctor` lists
    the available backends and the choice of `auto`."""

    attention: Literal["auto", "triton", "flash_attn", "sdpa", "reference"] = "auto"
    """`triton` and `flash_attn` skip blocks outside a document; PyTorch's `sdpa` computes and masks
    them; `reference` is the definition, for comparison."""
    norm: RowBackend = "auto"
    """RMSNorm, also fused with the preceding residual addition."""
    pointwise: RowBackend = "auto"
    """Rotary positions and SwiGLU."""
    loss: RowBackend = "auto"
    """Cross-entropy, also over a vocabulary sharded across ranks."""
    scan: Literal["auto", "triton", "mamba_ssm", "torch"] = "auto"
    """Selective scan and causal convolution of Mamba layers. `mamba_ssm` are the kernels of the
    packages mamba-ssm and causal-conv1d, which cannot separate documents."""
    linear_cross_entropy: bool = False
    """Compute head and loss in chunks of tokens, without the logits of all tokens in memory."""


class BatchConfig(Section):
    """Batch sizes in sequences. Gradient accumulation steps = global / (micro x data parallel)."""

    global_batch_size: Count
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Count
    """Sequences per forward pass of each data-parallel rank. `auto` uses the largest divisor of
    `global_batch_size` / data parallel, and of the ramp's sizes, whose predicted memory fits."""
    micro_batch_size_auto: bool = Field(default=False, exclude=True)
    """True if the run file has `micro_batch_size: auto`; not a key. The number is 1 until
    `planning.memory_fit.fit_micro_batches` computes it from the memory of a device."""
    rampup_batch_size: tuple[Count, Count, Count] | None = None
    """Batch ramp, `[start, increment, samples]` (name from Megatron-LM): the stage begins with
    `start` sequences per step, and over its first `samples` sequences the batch grows by
    `increment` at a time to `global_batch_size`. null disables it."""

    @model_validator(mode="before")
    @classmethod
    def _mark_auto(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("micro_batch_size") == "auto":
            return values | {"micro_batch_size": 1, "micro_batch_size_auto": True}
        return values


class OptimizerConfig(Section):
    """Optimizer of a stage. AdamW's defaults are those of the paper's code (tongxuluo/prts)."""

    type: Literal["adamw", "muon"] = "adamw"
    """`muon` updates the matrices of decoder layers by Muon, and the embedding, the head and all
    other parameters by AdamW."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Final learning rate of the schedule; at most `lr`."""
    adamw_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the parameters that AdamW updates in a run with Muon; null: `lr`."""
    adamw_min_lr: float | None = Field(default=None, ge=0)
    """Final learning rate of these parameters; at most `adamw_lr`. Null: `min_lr`."""
    decoupled_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the embedding and the head; null: that of the other parameters."""
    decoupled_min_lr: float | None = Field(default=None, ge=0)
    """Final learning rate of the embedding and the head; at most `decoupled_lr`. Null: `min_lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Epsilon added to the square root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay: each step subtracts lr x weight_decay x weight."""
    weight_decay_on: Literal["all", "matrices"] = "all"
    """Parameters that decay; `matrices` excludes the norms, in a separate optimizer group."""
    weight_decay_exclude: list[str] = Field(default=[])
    """Patterns of parameters without weight decay, such as `*.norm.weight`, in addition to those of
    `weight_decay_on`. `*` matches any characters; each pattern must match a parameter of some
    stage."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Maximum global gradient norm; 0 disables clipping."""
    z_loss_multiplier: float = Field(default=0.0, ge=0)
    """Coefficient of the z-loss, the squared log of the softmax denominator per position, which is
    added to the trained loss; PaLM uses 1e-4 (name from OLMo-core). Recorded losses are the
    cross-entropy without it."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon: decay rate of the momentum, the running mean of gradients."""
    nesterov: bool = True
    """Muon: update by the mean of gradient and momentum, weighted 1 - `momentum` and `momentum`."""
    ns_steps: int = Field(default=5, ge=1, lt=100)
    """Muon: steps of the Newton-Schulz iteration, which orthogonalizes the update."""
    adjust_lr_fn: Literal["match_rms_adamw", "original", "unit_rms_norm"] = "match_rms_adamw"
    """Muon: factor on the learning rate of a matrix. `match_rms_adamw`: 0.2 sqrt(max(out, in)),
    with which rates and weight decay of AdamW can be used. `original`: sqrt(max(1, out / in)).
    `unit_rms_norm`: sqrt(out / in), with which a width growth changes no rate."""

    @property
    def other_rates(self) -> dict[str, tuple[float, float]]:
        """(lr, min_lr) of the parameters whose rate differs from `lr`, by `rate` of their group."""
        pairs = {
            "adamw": (self.adamw_lr, self.adamw_min_lr),
            "decoupled": (self.decoupled_lr, self.decoupled_min_lr),
        }
        return {
            name: (peak, self.min_lr if final is None else final)
            for name, (peak, final) in pairs.items()
            if peak is not None
        }


MUON_KEYS = ("adamw_lr", "adamw_min_lr", "momentum", "nesterov", "ns_steps", "adjust_lr_fn")
"""Keys of `OptimizerConfig` that require `type: muon`."""

RATE_KEYS = ("lr", "min_lr", "adamw_lr", "adamw_min_lr", "decoupled_lr", "decoupled_min_lr")
"""Keys of `OptimizerConfig` that are learning rates."""


class ScheduleConfig(Section):
    """Learning rate as a function of the tokens since the start of the schedule.

    Set at most one of `warmup_steps` and `warmup_tokens`.
    """

    type: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Decay from `lr` to `min_lr`; `wsd` is warm-up, stable, decay."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Length of the linear warm-up from 0 to `lr`, in steps."""
    warmup_tokens: Count | None = None
    """Length of the linear warm-up, in tokens."""
    horizon_tokens: Count | None = None
    """Tokens at which cosine and linear reach `min_lr` and WSD ends. Default: the end of the
    run."""
    decay_tokens: Count | None = None
    """Tokens of WSD's final decay. Default: a tenth of the horizon."""
    restart: bool = False
    """In a stage without growth: start the schedule at the stage's first token, with its warm-up
    and rates, instead of continuing that of the previous stage. A growth has `lr_schedule`."""


class StageConfig(Section):
    """One model, trained for a number of tokens."""

    model: ModelConfig
    data: StageDataConfig
    tokens: Count
    """Tokens trained in this stage, rounded up to complete steps. `auto` uses equation 2 of the
    paper and the next stage. A stage sets exactly one of `tokens`, `at_tokens` and `at_flops`;
    `tokens` is computed from the other two."""
    at_tokens: Count | None = None
    """Cumulative tokens of the run at which this stage ends."""
    at_flops: Count | None = None
    """Cumulative FLOPs of the run, 6 x parameters x tokens, at which this stage ends."""
    tokens_auto: bool = Field(default=False, exclude=True)
    """True if the run file has `tokens: auto`; not a key. `stage_length.py` computes `tokens` from
    equation 2 of the paper and the next stage."""
    exact_tokens: int | None = Field(default=None, exclude=True)
    """Tokens of a stage that has begun, in complete steps of the batches it is trained with; null:
    `tokens`, rounded up to complete steps. Not a key; `stage_length.settled` computes it."""
    growth: GrowthConfig | None = None
    """Growth from the previous stage's model. Without it, a stage keeps the model and the
    optimizer state of the previous one; `rope_theta`, `rope_scaling`, `sliding_window` and
    `max_position_embeddings` may change (docs/guides/stages.md). Not allowed in the first stage."""
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelsConfig = KernelsConfig()
    deepspeed: DeepSpeedConfig | None = None
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig | None = None
    """Evaluation on lm-eval tasks during training; null disables it."""
