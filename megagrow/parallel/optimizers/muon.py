"""Muon for the matrices of decoder layers, and AdamW for all other parameters.

Muon (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982) updates a matrix by its orthogonalized
momentum. The orthogonalized matrix is the complete one under every ZeRO stage and tensor-parallel
size (`matrix_exchange`). The equations are those of torch.optim.Muon, which needs complete
matrices on each rank and computes in bf16 only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from megagrow.config.schema import OptimizerConfig
from megagrow.parallel.engine_config import ParamGroup
from megagrow.parallel.optimizers.matrix_exchange import MatrixExchange
from megagrow.parallel.optimizers.rules import MuonRule
from megagrow.parallel.sharding import ParamSpec

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al. 2024), as in torch.optim.Muon."""


def orthogonalized(matrix: Tensor, steps: int, eps: float) -> Tensor:
    """Return U V^T of a matrix U S V^T up to the error of Newton-Schulz, in its dtype.

    The singular values of the result are between 0.7 and 1.2 after 5 steps. A matrix whose norm is
    below `eps` is divided by `eps`.
    """
    a, b, c = NS_COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MatrixPiece(NamedTuple):
    """Part of a matrix in one of the optimizer's tensors: `numel` elements from `offset`."""

    name: str
    owner: Tensor
    offset: int
    numel: int


@dataclass(frozen=True)
class MatrixUpdate:
    """Options of Muon, and the factor on the learning rate of each matrix."""

    config: OptimizerConfig
    adjustments: Mapping[str, float]


def build_optimizer(
    model: nn.Module,
    groups: Sequence[ParamGroup],
    plan: dict[str, ParamSpec],
    config: OptimizerConfig,
) -> "AdamW | MuonWithAdamW":
    """Return the optimizer of a model, with one of its groups for each of `groups`."""
    named = dict(model.named_parameters())
    made: list[dict[str, Any]] = [
        {"params": [named[name] for name in group.names]}
        | group.hyper_parameters(config, config.lr)
        for group in groups
    ]
    if config.type == "adamw":
        return AdamW(made, betas=config.betas, fused=True)
    for values, group in zip(made, groups, strict=True):
        values["muon"] = isinstance(group.rule, MuonRule)
    adjustments = {
        name: spec.rule.adjustment(spec.rows, spec.cols)
        for name, spec in plan.items()
        if isinstance(spec.rule, MuonRule)
    }
    return MuonWithAdamW(made, MatrixUpdate(config, adjustments))


class MuonWithAdamW(Optimizer):
    """Optimizer of a rank's shards: groups with `muon` by Muon, the others by AdamW.

    As torch's fused AdamW it divides gradients by `grad_scale`, and changes nothing if `found_inf`
    is 1, without waiting for the device. `attach` must be called before the first step. All ranks
    step the same groups, and may step them in turn.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], options: MatrixUpdate) -> None:
        super().__init__(groups, {"lr": options.config.lr})
        self._options = options
        others = [group for group in self.param_groups if not group["muon"]]
        # The groups and the state are the same objects: DeepSpeed replaces parameters in place.
        self._adamw = AdamW(others, betas=options.config.betas, fused=True)
        self._adamw.state = self.state
        self._pieces: dict[Tensor, list[MatrixPiece]] = {}
        self._exchange: MatrixExchange | None = None

    def attach(self, exchange: MatrixExchange, pieces: Iterable[MatrixPiece]) -> None:
        """Register the pieces of all matrices in the optimizer's tensors, also empty ones."""
        self._exchange = exchange
        for piece in pieces:
            self._pieces.setdefault(piece.owner, []).append(piece)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters of all groups. Collective."""
        for name in ("grad_scale", "found_inf"):
            value = getattr(self, name)
            if value is not None:
                setattr(self._adamw, name, value)
        self._adamw.step()
        owners = [
            (group, owner)
            for group in self.param_groups
            if group["muon"]
            for owner in group["params"]
        ]
        if owners:
            self._step_matrices(owners)

    def _step_matrices(self, owners: list[tuple[dict[str, Any], Tensor]]) -> None:
        assert self._exchange is not None
        pieces: dict[str, Tensor] = {}
        eps: dict[str, float] = {}
        for group, owner in owners:
            update = self._with_momentum(owner).view(-1)
            for piece in self._pieces[owner]:
                pieces[piece.name] = update.narrow(0, piece.offset, piece.numel)
                eps[piece.name] = group["eps"]
        steps = self._options.config.ns_steps
        self._exchange.apply(pieces, lambda name, x: orthogonalized(x, steps, eps[name]))
        for name, values in pieces.items():
            values.mul_(self._options.adjustments[name])
        for group, owner in owners:
            assert owner.grad is not None
            rate = self._finite(owner) * group["lr"]
            owner.mul_(1 - rate * group["weight_decay"]).sub_(owner.grad.mul_(rate))

    def _with_momentum(self, owner: Tensor) -> Tensor:
        """Add a gradient to the momentum; return the update before orthogonalization.

        It replaces the gradient in memory.
        """
        gradient, buffer = owner.grad, self.state[owner]["momentum_buffer"]
        assert gradient is not None
        if self.grad_scale is not None:
            gradient.div_(self.grad_scale)
        if self.found_inf is not None:
            gradient.masked_fill_(self.found_inf.bool(), 0.0)
        momentum = self._options.config.momentum
        buffer.lerp_(gradient, self._finite(owner).to(buffer.dtype) * (1 - momentum))
        if not self._options.config.nesterov:
            return gradient.copy_(buffer)
        return gradient.lerp_(buffer, momentum)

    def _finite(self, owner: Tensor) -> Tensor:
        """Return 1 if the gradients are finite, else 0: a fp64 scalar on the device."""
        if self.found_inf is None:
            return torch.ones((), dtype=torch.float64, device=owner.device)
        return 1 - self.found_inf.to(owner.device, torch.float64)
