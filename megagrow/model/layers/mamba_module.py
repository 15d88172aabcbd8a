"""Module of Mamba-1.

Shapes: B batch, S sequence, D hidden size, C local channels, N state entries, R dt_rank, W taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagrow.config.schema import ModelConfig
from megagrow.model.layers.decoding import ScanState
from megagrow.model.layers.linears import apply_linears
from megagrow.model.layers.modules import Context, LayerModule, PartialSum
from megagrow.model.masks import masked
from megagrow.model.own_gradients import widened


class Convolution(nn.Module):
    """Weights of a depthwise convolution: (C, W), and a bias (C,)."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels))


class Mamba(LayerModule):
    """Gated selective scan (Gu and Dao 2023, section 3.4). The recurrence is in fp32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, state, rank = config.mamba_d_inner, config.mamba_d_state, config.mamba_dt_rank
        taps = config.mamba_d_conv
        assert channels and state and rank and taps
        self.sizes = (rank, state, state)
        self.A_log = nn.Parameter(torch.empty(channels, state))
        self.D = nn.Parameter(torch.empty(channels))
        self.in_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.conv1d = Convolution(channels, taps)
        self.x_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        self.sum_collective: nn.Module = PartialSum()
        self.dt_proj = nn.Linear(rank, channels)
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        x_BSC, gate_BSC = apply_linears(x_BSD, self.in_proj, self.gate_proj)
        x_BSC = masked(self._convolved(x_BSC, context), context.masks.inner)
        y_BSC = self._scanned(x_BSC, context)
        return self.project_product(context, gate_BSC, y_BSC, None, self.out_proj)

    def _convolved(self, x_BSC: Tensor, context: Context) -> Tensor:
        weights = self.conv1d.weight, self.conv1d.bias
        if context.state is not None:
            assert isinstance(context.state, ScanState)
            return context.state.convolve(x_BSC, *weights)
        return context.ops.causal_conv(x_BSC, *weights, context.documents.starts())

    def _scanned(self, x_BSC: Tensor, context: Context) -> Tensor:
        (mixed,) = apply_linears(x_BSC, self.x_proj)
        dt_BSR, B_BSN, C_BSN = self.sum_collective(mixed).split(self.sizes, dim=-1)
        dt_BSC = F.linear(dt_BSR, self.dt_proj.weight)
        A_CN = -widened(self.A_log).exp()
        inputs = x_BSC, dt_BSC, A_CN, B_BSN, C_BSN, self.D, self.dt_proj.bias
        if context.state is not None:
            assert isinstance(context.state, ScanState)
            return context.state.scan(*inputs)
        return context.ops.selective_scan(*inputs, context.documents.starts())
