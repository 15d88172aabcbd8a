"""Factors on a parameter's hyper-parameters. Pure data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParamScale:
    """Factors on one parameter's hyper-parameters with which a grown model follows its source
    exactly (docs/reference/operators.md: lr / k_in, weight decay * k_in, eps / k_out)."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    norm: float = 1.0
    """Weight of the squared gradient norm in the global norm: k_out / k_in."""

    def times(self, other: "ParamScale") -> "ParamScale":
        """Both, one growth after the other."""
        return ParamScale(
            self.lr * other.lr,
            self.weight_decay * other.weight_decay,
            self.eps * other.eps,
            self.norm * other.norm,
        )


UNSCALED = ParamScale()
"""All factors 1."""
