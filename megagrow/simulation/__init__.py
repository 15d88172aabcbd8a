"""Simulated device: a rank of a run on tensors without data, with counters of its GPU work."""
