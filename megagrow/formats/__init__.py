"""Readers and writers of other programs' checkpoints."""
