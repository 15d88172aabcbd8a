"""Selective scan and causal convolution of the packages mamba-ssm and causal-conv1d.

Both packages are optional and imported on first use. They store sequences as (B, C, S).
"""

from importlib import import_module

import torch
from torch import Tensor


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    starts: None = None,
) -> Tensor:
    """Return `reference.selective_scan` of rows that are one document each.

    mamba-ssm cannot reset the state at the first token of a document. A, D and dt_bias are
    converted to fp32, which it requires. Raises ImportError if mamba-ssm cannot be imported,
    ValueError for starts of documents.
    """
    if starts is not None:
        raise ValueError("mamba-ssm cannot reset the state at document boundaries")
    scan = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    x_BCS, dt_BCS, B_BNS, C_BNS = (tensor.transpose(1, 2).contiguous() for tensor in (x, dt, B, C))
    parameters = {"D": D.float(), "delta_bias": dt_bias.float()}
    y_BCS: Tensor = scan(x_BCS, dt_BCS, A.float(), B_BNS, C_BNS, delta_softplus=True, **parameters)
    return y_BCS.transpose(1, 2)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None) -> Tensor:
    """Return `reference.causal_conv`; weight is (C, W) with 2 to 4 taps.

    Raises ImportError if causal-conv1d cannot be imported.
    """
    conv = import_module("causal_conv1d").causal_conv1d_fn
    documents_BS = None if starts is None else starts.cumsum(1, dtype=torch.int32)
    # A transposed view of contiguous tokens: the package requires this layout for documents.
    x_BCS = x.contiguous().transpose(1, 2)
    y_BCS: Tensor = conv(x_BCS, weight, bias, seq_idx=documents_BS, activation="silu")
    return y_BCS.transpose(1, 2)
