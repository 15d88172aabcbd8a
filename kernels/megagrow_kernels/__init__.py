"""Kernels of megagrow, each beside its eager reference: plain torch, the specification of the op."""
