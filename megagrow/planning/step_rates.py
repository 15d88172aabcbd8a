"""How much of its datasheet a GPU reaches in training: the constants of the model of a step.

Each has one meaning, and holds for every model, layout and cluster. `docs/results/scaling.md` says
which of
them were set from published rows, and shows all rows beside what they give.
"""

MATMUL_SHARE = {"ampere": 0.87, "hopper": 0.80}
"""Of the dense bf16 peak, a large matrix product: 271 of 312 TFLOP/s on an A100, 794 of 989 on an
H100 (S. Bekman, ml-engineering, "Maximum Achievable Matmul FLOPS"); 788 on an H200 (random numbers,
8192 x 8192 x 8192). It is the power that limits Hopper, so it holds while the card may take its
TDP."""

TILE = (128, 256)
"""Rows and columns of the result that one multiprocessor computes at a time (cuBLAS on both)."""

TILE_START = 256
"""What a tile costs besides its inner products, as so many more columns of the inner dimension:
filling the pipeline, and writing the result. Set from the small models of llm-foundry."""

BUSY_SHARE = {
    ("ampere", "eager"): 0.97,
    ("ampere", "fused"): 0.97,
    ("ampere", "compiled"): 0.97,
    ("hopper", "eager"): 0.86,
    ("hopper", "fused"): 0.86,
    ("hopper", "compiled"): 0.97,
}
"""Of the speed of a product alone, within a training step: other operations leave the caches and
the clock in another state than a loop of one product finds, and there are gaps between kernels,
which hurt most where the products are fastest. Set from one row for single PyTorch calls on Ampere,
one on Hopper, and one for torch.compile on Hopper; the others are taken as their neighbours."""

ATTENTION_SHARE = {
    ("flash1", "ampere"): 0.34,
    ("flash1", "hopper"): 0.18,
    ("flash2", "ampere"): 0.52,
    ("flash2", "hopper"): 0.31,
    ("flash3", "hopper"): 0.52,
}
"""Of the dense bf16 peak, attention's products over what a causal mask lets through, forward and
backward together. `flash2`: 160 of 312 on A100 (Dao, arXiv 2307.08691, figures 4 to 6), 290 to 335
of 989 on H100, `flash3`: 440 to 600 (Shah et al., arXiv 2407.08608, figures 5 and 6; cuDNN's is
of that class, and ours is taken to be). `flash1`, Triton's of 2022, is set from two rows of 65,536
tokens."""

HEAD_64 = 0.85
"""Speed of attention with heads of 64 or fewer dimensions over that with 128: 0.77 forward, 0.84
backward, 0.9 by FlashAttention-2 (same figures)."""

DIAGONAL = 128
"""Positions for each query that a causal kernel computes and throws away, in blocks on the
diagonal."""

BACKWARD_ATTENTION = 2.5
"""Backward over forward FLOPs: five products in place of two, one of them the forward's again."""

HBM_SHARE = 0.80
"""Of the datasheet's bandwidth, operations that only move memory: norms, rotary positions,
activations, Adam (79% to 87% for fused norms on H100; a plain copy reaches 90% on an H200)."""

EAGER_TRAFFIC = 2.5
"""Bytes that operations out of single PyTorch calls move, over those of fused ones: a norm with
its casts, a residual, an activation each read and write for themselves. Counted by hand."""

LOSS_BYTES = {"eager": 30, "fused": 6, "compiled": 6}
"""For each logit: written, read, its gradient written in place; or with an fp32 copy, its softmax,
and a backward pass of both."""

ADAM_BYTES = {"eager": 104, "fused": 34, "compiled": 34}
"""For each parameter: gradient, master and both moments read, the last three written, the 16-bit
weight written; the gradient read once more for its norm. Or with a pass over the memory for each
operation of Adam and of clipping."""

NVLINK_SHARE = 0.80
"""Of NVLink's bandwidth in one direction, a large collective: 230 to 240 of 300 GB/s on A100, 360
of 450 on H100 (nccl-tests, gathers and scatters; all-reduces by NVLink SHARP reach more)."""

NIC_SHARE = 0.80
"""Of the network card's bandwidth, a large collective over hosts: nccl-tests reach 0.9 on quiet
networks, and FSDP's buckets of a layer are smaller than those of nccl-tests."""

HIDDEN_COST = 0.45
"""Of the time of a collective that runs beside computation, what it costs all the same: it takes
multiprocessors, memory bandwidth and power, and what is computed next does not always wait for the
right one. Set from one row."""

COLLECTIVE_SECONDS = 20e-6
"""Start of a collective within a node (nccl-tests, small messages)."""

GROWTH_SECONDS = 1.0
"""Of a live growth, what does not depend on the bytes that it moves: a new engine, and the plan of
who sends what (`docs/results/growth-benchmark.md`: 0.2 to 0.3 s and 0.1 to 0.7 s, for 512
ranks)."""
