"""Fused Triton kernels of megagrow, and the eager PyTorch references that specify them."""
