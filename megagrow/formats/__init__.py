"""Readers and writers of checkpoints of other programs: Hugging Face, Megatron-LM, DeepSpeed."""
