"""Constants of the step model: fractions of datasheet figures that GPUs reach in training.

Each constant has one meaning for all models, layouts and clusters. docs/results/scaling.md lists
those set from published rows, and compares all rows with predictions.
"""

MATMUL_SHARE = {"ampere": 0.87, "hopper": 0.80}
"""Fraction of the dense bf16 peak reached by a large matrix product: 271 of 312 TFLOP/s on an A100,
794 of 989 on an H100 (S. Bekman, ml-engineering, "Maximum Achievable Matmul FLOPS"); 788 on an H200
(random values, 8192 x 8192 x 8192). Hopper is power-limited, so the value requires full TDP."""

TILE = (128, 256)
"""Rows and columns of the result tile of one multiprocessor (cuBLAS on both families)."""

TILE_START = 256
"""Overhead of a tile (filling the pipeline, writing the result), in columns of the inner dimension.
Set from the small models of llm-foundry."""

BUSY_SHARE = {
    ("ampere", "eager"): 0.97,
    ("ampere", "fused"): 0.97,
    ("ampere", "compiled"): 0.97,
    ("hopper", "eager"): 0.86,
    ("hopper", "fused"): 0.86,
    ("hopper", "compiled"): 0.97,
}
"""Speed of a product within a training step relative to the product alone: other operations change
caches and clock, and gaps between kernels matter most where products are fastest. Set from one row
for single PyTorch calls on Ampere, one on Hopper, and one for torch.compile on Hopper; the others
equal their neighbors."""

ATTENTION_SHARE = {
    ("flash1", "ampere"): 0.34,
    ("flash1", "hopper"): 0.18,
    ("flash2", "ampere"): 0.52,
    ("flash2", "hopper"): 0.31,
    ("flash3", "hopper"): 0.52,
}
"""Fraction of the dense bf16 peak reached by attention, counting products of unmasked positions,
forward and backward. `flash2`: 160 of 312 on A100 (Dao, arXiv 2307.08691, figures 4 to 6), 290 to
335 of 989 on H100; `flash3`: 440 to 600 (Shah et al., arXiv 2407.08608, figures 5 and 6; cuDNN's
attention is as fast, and megagrow's is assumed to be). `flash1`, the 2022 Triton kernel, is
set from two rows of 65,536 tokens."""

HEAD_64 = 0.85
"""Speed of attention with head dimension up to 64 relative to 128: 0.77 forward, 0.84 backward, 0.9
for FlashAttention-2 (same figures)."""

DIAGONAL = 128
"""Masked positions per query that a causal kernel computes in diagonal blocks."""

BACKWARD_ATTENTION = 2.5
"""Backward over forward FLOPs: five products instead of two, one of them recomputed."""

HBM_SHARE = 0.80
"""Fraction of the datasheet bandwidth reached by memory-bound operations: norms, rotary embeddings,
activations, Adam (79% to 87% for fused norms on H100; a plain copy reaches 90% on an H200)."""

EAGER_TRAFFIC = 2.5
"""Memory traffic of single PyTorch calls relative to fused kernels: a norm with its casts, a
residual and an activation each read and write separately. Counted by hand."""

LOSS_BYTES = {"eager": 30, "fused": 6, "compiled": 6}
"""Bytes per logit: write, read, in-place gradient; eager adds an fp32 copy, its softmax, and the
backward pass of both."""

ADAM_BYTES = {"eager": 104, "fused": 34, "compiled": 34}
"""Bytes per parameter: gradient, master weight and both moments read, the last three and the 16-bit
weight written, the gradient read again for its norm. Eager makes one pass over memory per operation
of Adam and of clipping."""

NVLINK_SHARE = 0.80
"""Fraction of NVLink's one-directional bandwidth reached by a large collective: 230 to 240 of 300
GB/s on A100, 360 of 450 on H100 (nccl-tests, all-gather and reduce-scatter; all-reduces by NVLink
SHARP are faster)."""

NIC_SHARE = 0.80
"""Fraction of the network bandwidth reached by a large collective between hosts: nccl-tests reach
0.9 on idle networks; per-layer FSDP buckets are smaller than those of nccl-tests."""

HIDDEN_COST = 0.45
"""Cost of a collective that overlaps with computation, as a fraction of its time: it uses
multiprocessors, memory bandwidth and power, and scheduling is not perfect. Set from one row."""

COLLECTIVE_SECONDS = 20e-6
"""Start-up time of a collective within a node (nccl-tests, small messages)."""

GROWTH_SECONDS = 1.0
"""Fixed seconds of a live growth: the new engine and the transfer plan
(docs/results/growth-benchmark.md: 0.2 to 0.3 s and 0.1 to 0.7 s, for 512 ranks)."""
