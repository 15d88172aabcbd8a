"""Update rules: the optimizer state of a parameter and its law under growth. Pure.

A rule declares the states of a parameter, which sharding, checkpoints, growth, resharding and the
memory plan read, and the factors on its hyper-parameters with which a grown parameter follows its
source. All states but the fp32 weight are linear in the gradient (`exp_avg`, `momentum_buffer`) or
in its square (`exp_avg_sq`), so the growth map has one set of terms for all of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal, get_args

from megagrow.config.schema import OptimizerConfig

StateKind = Literal["fp32", "exp_avg", "exp_avg_sq", "momentum_buffer"]
"""States of parameters: fp32 master weight, AdamW's first and second moment, Muon's momentum."""

STATE_KINDS: tuple[StateKind, ...] = get_args(StateKind)
"""All states; those of one parameter are `UpdateRule.kinds`."""

OptimizerName = Literal["adamw", "muon"]


@dataclass(frozen=True)
class ParamScale:
    """Factors on one parameter's hyper-parameters after a growth.

    They keep a grown model on the trajectory of its source (docs/reference/operators.md).
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    norm: float = 1.0
    """Weight of the squared gradient norm in the global norm: k_out / k_in."""

    def times(self, other: "ParamScale") -> "ParamScale":
        """Return the product of the factors of two consecutive growths."""
        return ParamScale(
            self.lr * other.lr,
            self.weight_decay * other.weight_decay,
            self.eps * other.eps,
            self.norm * other.norm,
        )


UNSCALED = ParamScale()
"""Scale with all factors equal to 1."""


@dataclass(frozen=True)
class Copies:
    """Growth of a matrix by even copies: its shape before, and the copies of its columns and
    rows."""

    rows: int
    cols: int
    k_in: int = 1
    k_out: int = 1


class UpdateRule(ABC):
    """Optimizer of a parameter."""

    name: ClassVar[OptimizerName]
    kinds: ClassVar[tuple[StateKind, ...]]
    """States of the parameter, in the order of checkpoints."""

    @abstractmethod
    def continuation(self, copies: Copies) -> ParamScale:
        """Return the factors with which a parameter that grew by even copies follows its source.

        The weights are divided by k_in and the gradients by k_out.
        """


@dataclass(frozen=True)
class AdamWRule(UpdateRule):
    """AdamW. Its update does not depend on the scale of the gradient."""

    name: ClassVar[OptimizerName] = "adamw"
    kinds: ClassVar[tuple[StateKind, ...]] = ("fp32", "exp_avg", "exp_avg_sq")

    def continuation(self, copies: Copies) -> ParamScale:
        """Return lr / k_in, weight decay * k_in, eps / k_out."""
        k_in, k_out = copies.k_in, copies.k_out
        return ParamScale(1 / k_in, k_in, 1 / k_out, k_out / k_in)


@dataclass(frozen=True)
class MuonRule(UpdateRule):
    """Muon: the orthogonalized momentum of a complete matrix.

    `adjust_lr_fn` selects the factor on the update, as in torch.optim.Muon.
    """

    name: ClassVar[OptimizerName] = "muon"
    kinds: ClassVar[tuple[StateKind, ...]] = ("fp32", "momentum_buffer")
    adjust_lr_fn: Literal["match_rms_adamw", "original", "unit_rms_norm"] = "match_rms_adamw"

    def adjustment(self, rows: int, cols: int) -> float:
        """Return the factor on the learning rate of a matrix (out = rows, in = cols)."""
        match self.adjust_lr_fn:
            case "match_rms_adamw":
                return 0.2 * sqrt(max(rows, cols))
            case "original":
                return sqrt(max(1.0, rows / cols))
            case "unit_rms_norm":
                return sqrt(rows / cols)

    def continuation(self, copies: Copies) -> ParamScale:
        """Return the factors on lr, weight decay and eps.

        The orthogonalized momentum of a copied matrix is the copied one / sqrt(k_out k_in), and the
        weights require it / k_in. The norm of the momentum is multiplied by sqrt(k_in / k_out).
        """
        k_in, k_out = copies.k_in, copies.k_out
        before = self.adjustment(copies.rows, copies.cols)
        after = self.adjustment(copies.rows * k_out, copies.cols * k_in)
        lr = sqrt(k_out / k_in) * before / after
        if self.adjust_lr_fn == "unit_rms_norm":
            lr = 1.0  # exactly; the factors above are rounded
        return ParamScale(lr, 1 / lr, sqrt(k_in / k_out), k_out / k_in)


ADAMW = AdamWRule()


def matrix_rule(optimizer: OptimizerConfig) -> UpdateRule:
    """Return the rule of the matrices of decoder layers; AdamW updates all other parameters."""
    return MuonRule(optimizer.adjust_lr_fn) if optimizer.type == "muon" else ADAMW


def source_kind(kind: StateKind, kinds: Iterable[StateKind]) -> StateKind | None:
    """Return the state of a source, out of `kinds`, that becomes a state of its target.

    Muon's momentum and AdamW's first moment are both a running mean of gradients. None: the state
    starts at zero.
    """
    if kind in kinds:
        return kind
    return "exp_avg" if kind == "momentum_buffer" and "exp_avg" in kinds else None
