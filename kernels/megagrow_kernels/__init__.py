"""Kernels of megagrow, each beside its eager reference: the specification, in plain torch."""
