"""Section `deepspeed` of a stage: options of DeepSpeed's ZeRO 3 that megagrow does not set."""

from megagrow.config.sections import CountOrZero, Section


class DeepSpeedZeroConfig(Section):
    """Options of DeepSpeed's `zero_optimization`, with DeepSpeed's defaults."""

    sub_group_size: CountOrZero = 1_000_000_000
    """Elements of a rank's shard that one call of the optimizer updates, rounded up to complete
    parameters."""
    stage3_prefetch_bucket_size: CountOrZero | None = None
    """Elements of parameters that are gathered ahead of their use. Null: the rank's slice of the
    model, at most 50M."""
    stage3_param_persistence_threshold: CountOrZero = 100_000
    """Elements up to which a parameter stays gathered until the weights are updated."""
    stage3_max_live_parameters: CountOrZero = 1_000_000_000
    """Maximum elements of gathered parameters on a rank."""
    stage3_max_reuse_distance: CountOrZero = 1_000_000_000
    """Elements between two uses of a parameter up to which it stays gathered."""
    overlap_comm: bool = True
    """Reduce gradients and gather parameters on separate streams of the GPU."""
    contiguous_gradients: bool = True
    """Copy gradients to one buffer as they arrive."""


class DeepSpeedConfig(Section):
    """Options passed to DeepSpeed, by its names; they change results only by rounding. Only for
    stages with `zero_stage: 3`: other ZeRO stages run megagrow's own update and reduction."""

    zero_optimization: DeepSpeedZeroConfig = DeepSpeedZeroConfig()


SET_BY = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "gradient_clipping": "optimizer.gradient_clipping",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "data_types": "precision",
    "communication_data_type": "parallel.communication_data_type",
    "tensor_parallel": "parallel.tensor_model_parallel_size",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "stage": "parallel.zero_stage",
    "offload_optimizer": "parallel.offload_optimizer",
    "zero_hpz_partition_size": "parallel.zero_hpz_partition_size",
    "checkpoint": "checkpoint",
    "tensorboard": "logging.tensorboard",
    "wandb": "logging.wandb_project",
    "steps_per_print": "logging.interval",
    "comms_logger": "logging.profile",
    "flops_profiler": "logging.profile",
    "wall_clock_breakdown": "logging.profile",
    "cpu_offload": "parallel.offload_optimizer",
}
"""Options of DeepSpeed that megagrow sets -> the key that determines them."""
