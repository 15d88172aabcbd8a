"""DeepSpeed's engine: a Llama that is trained on all ranks, and its state as this rank holds it.

An engine is built empty. Its state (fp32 weights, Adam's moments and step) is then written into
the partitions in place: by the initialiser, from a checkpoint, or by a reshard. `ready` passes the
written weights on to the copies that the forward pass uses.
"""

import gc
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megagrow.config.schema import OptimizerConfig
from megagrow.parallel.deepspeed_import import deepspeed
from megagrow.parallel.engine_build import built_empty, nothing_sent
from megagrow.parallel.engine_config import (
    EngineSettings,
    ParamGroup,
    deepspeed_config,
    parameter_groups,
)
from megagrow.parallel.gradients import clip_whole_gradients, sum_flat, weigh_norm
from megagrow.parallel.materialize import build_model, materialise, materialise_flat, zeros_like
from megagrow.parallel.partitions import (
    forget_gradients,
    partition_zero3,
    places,
    refresh,
    unlink_zero3,
)
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import parameter_plan
from megagrow.parallel.update_scaling import ScaledPart, UpdateScaler

STATE_KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""What is kept of every parameter, under the names of DeepSpeed's universal checkpoint."""

Storage = dict[str, dict[str, Tensor]]
"""Parameter -> kind of state -> the interval of its flattened slice that this rank holds, 1-D fp32.
A parameter of which it holds nothing is absent."""


class ZeroEngine:
    """A Llama trained by DeepSpeed under ZeRO 0, 1, 2 or 3 and tensor parallelism."""

    def __init__(self, settings: EngineSettings, topology: Topology) -> None:
        self.settings = settings
        self.topology = topology
        self.plan = parameter_plan(settings.model, topology.tp)
        self.stage = settings.parallel.zero_stage
        # ZeRO 0 keeps no fp32 master beside bf16 weights: there bf16 is an autocast of fp32.
        self._autocast = settings.bf16 and self.stage == 0
        low_precision = settings.bf16 and not self._autocast
        dtype = torch.bfloat16 if low_precision else torch.float32
        self._groups = parameter_groups(self.plan, settings.optimizer, settings.scales)
        self.groups = tuple(group.names for group in self._groups)
        config = deepspeed_config(settings, topology, self.plan)
        model = build_model(self.plan, settings, topology, dtype)
        flats: list[Tensor] = []
        if self.stage in (1, 2):
            flats = materialise_flat(model, self.groups, topology)
        else:
            partition = partition_zero3(config, topology, dtype) if self.stage == 3 else None
            with nothing_sent():
                materialise(model, topology.device, partition)
        optimizer = _adamw(model, self._groups, settings.optimizer)
        with built_empty(flats, topology.device):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=config,
                mpu=topology,
                dist_init_required=False,
            )
        self._adam = optimizer
        self._places = partial(places, self._engine, self.stage)
        self._factors = UpdateScaler(optimizer)
        self._create_moments()
        if self.stage in (1, 2) and not (low_precision or settings.parallel.offload_optimizer):
            sum_flat(self._engine.optimizer)
        if self.stage > 0:
            weights = [group.scale.norm for group in self._groups]
            weigh_norm(self._engine.optimizer, self.stage, weights)

    def forward(self, *inputs: Any) -> Tensor:
        """Logits (B, S, V/tp) for what the model takes: (input_ids, position_ids, documents, this
        rank's masks); or what a fifth input, a loss, makes of the head."""
        device = self.topology.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._autocast):
            return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of one micro batch; the accumulation's mean is taken."""
        self._engine.backward(loss)

    def step(self, lr: float) -> float | None:
        """Ends a micro batch; where it is the last one, updates the weights.

        Returns the gradient norm before clipping (global, L2, with the weights of the parameters'
        scales) after the last one. Where that is not finite, as every rank knows, nothing of the
        state was changed and the gradients are gone.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        norm = None
        if boundary:
            for values, group in zip(self._adam.param_groups, self._groups, strict=True):
                values |= group.hyper_parameters(self.settings.optimizer, lr)
            if self.stage == 0:
                norm = self._clip_stage0()
        self._engine.step()
        if boundary and self.stage > 0:
            norm = self._engine.get_global_grad_norm()
            if not math.isfinite(norm):
                forget_gradients(self._engine.optimizer, self.stage)
        return None if norm is None else float(norm)

    def train(self, mode: bool = True) -> None:
        """Switches between training and evaluation, as nn.Module.train."""
        self._engine.train(mode)

    def storage(self) -> Storage:
        """This rank's part of every parameter's state: views of the optimizer's own tensors.

        They lie on the engine's device, or on the CPU with `offload_optimizer`.
        """
        out: Storage = {}
        for place in self._places():
            if place.numel > 0:
                state = self._adam.state[place.owner]
                tensors = (place.owner.data, state["exp_avg"], state["exp_avg_sq"])
                parts = (place.of(tensor) for tensor in tensors)
                out[place.name] = dict(zip(STATE_KINDS, parts, strict=True))
        return out

    def intervals(self) -> dict[str, range]:
        """Which interval of its flattened slice this rank holds of each parameter, by DeepSpeed's
        own bookkeeping."""
        return {p.name: range(p.start, p.start + p.numel) for p in self._places() if p.numel > 0}

    def mark_new(self, masks: Mapping[str, Tensor]) -> None:
        """Says which entries are new, for `set_update_factors`; call it once.

        By parameter, in the order and on the device of the storage: (n,) bool. A parameter without
        a mask is all old.
        """
        held = [place for place in self._places() if place.numel > 0]
        self._factors.place(
            (place.owner, ScaledPart(place.of(place.owner.data), masks.get(place.name)))
            for place in held
        )

    def set_update_factors(self, new: float = 1.0, old: float = 1.0) -> None:
        """Multiplies what the next steps change of new and of old entries; needs `mark_new`.

        A factor on the change is one on the learning rate; at 0 not a bit changes.
        """
        self._factors.set(new, old)

    @property
    def adam_step(self) -> int:
        """Updates that Adam's bias correction counts: one number for all parameters."""
        steps = {int(state["step"]) for state in self._adam.state.values()}
        if len(steps) != 1:
            raise AssertionError(f"rank {self.topology.rank}: Adam's steps differ: {steps}")
        return steps.pop()

    def ready(self, adam_step: int) -> None:
        """Call after writing the storage: sets Adam's step, refreshes the forward weights."""
        for state in self._adam.state.values():
            state["step"].fill_(adam_step)
        refresh(self._engine.optimizer, self.stage, self.topology)

    def release(self) -> Storage:
        """Destroys the engine and returns its state, now all that is left of it in memory."""
        storage = self.storage()
        self._engine.destroy()
        if self.stage == 3:
            unlink_zero3(self._engine)
        del self._engine, self._adam, self._places, self._factors
        gc.collect()
        return storage

    def _clip_stage0(self) -> Tensor:
        named = dict(self._engine.module.named_parameters())
        groups = [([named[name] for name in g.names], g.scale.norm) for g in self._groups]
        limit = self.settings.optimizer.gradient_clipping
        norm = clip_whole_gradients(groups, limit, self.topology)
        if not norm.isfinite():
            for parameter in named.values():  # AdamW passes over what has no gradient
                parameter.grad = None
        return norm

    def _create_moments(self) -> None:
        # A fresh engine has no moments (DeepSpeed makes them in the first step).
        for owner in {id(place.owner): place.owner for place in self._places()}.values():
            self._adam.state[owner] = {
                "step": torch.zeros((), dtype=torch.float32, device=owner.device),
                "exp_avg": zeros_like(owner),
                "exp_avg_sq": zeros_like(owner),
            }


def _adamw(
    model: nn.Module, groups: tuple[ParamGroup, ...], config: OptimizerConfig
) -> torch.optim.AdamW:
    named = dict(model.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [named[name] for name in group.names]}
            | group.hyper_parameters(config, config.lr)
            for group in groups
        ],
        betas=config.betas,
        fused=True,
    )
