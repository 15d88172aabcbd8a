"""Pretraining of language models with DeepSpeed that grow in the middle of the run."""

__version__ = "0.2.0"
