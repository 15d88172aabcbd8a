"""Factors on an optimizer's updates, entry by entry.

Old and new entries of a grown tensor share one flat tensor, one optimizer group and one step: a
rate of their own can only be a factor on what the step changes, w = before + factor * (w - before).
AdamW's weight decay is part of the change, so a factor f is a learning rate of f * lr, and a factor
of 0 leaves the bits as they are.

It is done by torch's hooks around `step`, and so within DeepSpeed's own step: the weights that are
passed on to the forward pass are already these.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaledPart:
    """A parameter's part of a tensor that the optimizer updates, and which of it is new."""

    values: Tensor
    """(n,), a view of the optimizer's tensor."""
    new: Tensor | None
    """(n,), bool; None where all of it is old."""


class UpdateScaler:
    """Two factors: on the updates of all new entries, and on those of all old ones.

    While one of them is not 1 a step needs memory for a copy of what it updates at a time (under
    ZeRO 1 and 2 a group of this rank's share), else it costs nothing.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._new = 1.0
        self._old = 1.0
        self._parts: dict[Tensor, list[ScaledPart]] | None = None
        self._before: list[tuple[ScaledPart, Tensor]] = []
        optimizer.register_step_pre_hook(self._keep)
        optimizer.register_step_post_hook(self._blend)

    def place(self, parts: Iterable[tuple[Tensor, ScaledPart]]) -> None:
        """Says what the optimizer's tensors consist of: (tensor, part of it), for each parameter.

        What belongs to no part (padding) is updated as ever.
        """
        self._parts = {}
        for owner, part in parts:
            self._parts.setdefault(owner, []).append(part)

    def set(self, new: float, old: float) -> None:
        """The factors of the steps that follow."""
        if self._parts is None and not new == old == 1:
            raise AssertionError("update factors are set, but nothing says which entries are new")
        self._new, self._old = new, old

    def _keep(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._parts is None or self._new == self._old == 1:
            return
        updated = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        parts = [part for tensor in updated for part in self._parts.get(tensor, ())]
        touched = [part for part in parts if part.new is not None or self._old != 1]
        self._before = [(part, part.values.clone()) for part in touched]

    def _blend(self, *_: Any) -> None:
        # lerp gives the very bits of its ends at 0 and at 1.
        for part, before in self._before:
            if part.new is None:
                before.lerp_(part.values, self._old)
            else:
                before.lerp_(part.values, torch.where(part.new, self._new, self._old))
            part.values.copy_(before)
        self._before = []
