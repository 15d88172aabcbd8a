"""How much a model computes, by two accounts, and what a device could.

`config.parameters.paper_flops_per_token` is the account of the papers on growth, by which speedups
are measured. `flops_per_token` here counts the matrix products that are really done; utilisation
(MFU) is measured by it.
"""

from megagrow.config.lengths import stage_tokens
from megagrow.config.parameters import matmul_parameters
from megagrow.config.schema import ModelConfig, RunConfig

PEAK_FLOPS = (
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H800 PCIE", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
)
"""Words of a device's name -> its dense bf16 FLOP/s (NVIDIA's datasheets, sparsity taken out).
The first row all of whose words are in the name holds; a plain H100 or H200 is the SXM one."""


def flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Training FLOPs per token: 6 per matrix weight, and attention over `sequence_length`."""
    return 6 * matmul_parameters(model) + attention_flops(model, sequence_length)


def attention_flops(model: ModelConfig, sequence_length: int) -> int:
    """Training FLOPs per token of q k^T and of the weighted sum of v, in all layers.

    Each takes 2 heads head_dim FLOPs for every position seen, forward, and twice that backward:
    12 L heads head_dim per position (PaLM, arXiv 2204.02311, appendix B; Chinchilla, arXiv
    2203.15556, appendix F). They count all S positions; a causal kernel sees (S + 1) / 2 on
    average, which is what is counted here. Work done twice by activation checkpointing is not
    counted.
    """
    width = model.num_attention_heads * model.head_dim
    return 6 * model.num_hidden_layers * width * (sequence_length + 1)


def run_flops(run: RunConfig) -> int:
    """FLOPs of the whole run, as `flops_per_token` counts them."""
    length = run.data.sequence_length
    return sum(stage_tokens(s, length) * flops_per_token(s.model, length) for s in run.stages)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device, by its name in `torch.cuda.get_device_name`.

    None where it is not known, so also for a slice of a device (MIG).
    """
    words = set(device_name.upper().replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((peak for name, peak in PEAK_FLOPS if words.issuperset(name.split())), None)
