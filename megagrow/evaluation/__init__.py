"""Evaluation of checkpoints and of training runs on lm-eval's tasks."""
