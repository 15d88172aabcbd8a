"""Evaluation of checkpoints by lm-eval's tasks."""
