"""Training engine of a model under any ZeRO stage, with access to this rank's shard of its state.

An engine is built empty. Its state (fp32 weights, Adam's moments and step) is then written into
the partitions in place: by initialization, from a checkpoint, or by a reshard. `ready` copies the
written weights to the forward weights.
"""

import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megagrow.config.schema import OptimizerConfig
from megagrow.model.decoder import CausalLM
from megagrow.parallel.deepspeed_import import deepspeed
from megagrow.parallel.engine_build import built_empty, no_weight_broadcast
from megagrow.parallel.engine_config import (
    EngineSettings,
    ParamGroup,
    deepspeed_config,
    parameter_groups,
)
from megagrow.parallel.materialize import (
    FlatWeights,
    build_model,
    materialize,
    materialize_flat,
    zeros_like,
)
from megagrow.parallel.partitions import (
    Zero3Partitioner,
    fragments,
    refresh,
    set_norm_weights,
    unlink_zero3,
)
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.replicated import ReplicatedEngine
from megagrow.parallel.sharding import STATE_KINDS, Storage, parameter_plan
from megagrow.parallel.update_scaling import ScaledPart, UpdateScaler


class ZeroEngine:
    """Model trained under ZeRO 0, or by DeepSpeed under ZeRO 1, 2 or 3, with tensor parallelism."""

    def __init__(self, settings: EngineSettings, topology: Topology) -> None:
        self.settings = settings
        self.topology = topology
        self.plan = parameter_plan(settings.model, topology.tp)
        self.zero_stage = settings.parallel.zero_stage
        # ZeRO 0 keeps no fp32 master weights: there, bf16 is an autocast of fp32.
        self._autocast = settings.bf16 and self.zero_stage == 0
        low_precision = settings.bf16 and not self._autocast
        dtype = torch.bfloat16 if low_precision else torch.float32
        self._groups = parameter_groups(self.plan, settings.optimizer, settings.scales)
        self.groups = tuple(group.names for group in self._groups)
        model = build_model(self.plan, settings, topology, dtype)
        self._engine: Any
        if self.zero_stage == 0:
            materialize(model, topology.device, partition=None)
            self._adam = _adamw(model, self._groups, settings.optimizer)
            self._engine = ReplicatedEngine(model, self._adam, self._groups, settings, topology)
        else:
            self._engine = self._partitioned(model, dtype)
        self._fragments = partial(fragments, self._engine, self.zero_stage)
        self._factors = UpdateScaler(self._adam)
        self._create_moments()

    def _partitioned(self, model: CausalLM, dtype: torch.dtype) -> Any:
        """Return DeepSpeed's engine of a model on the meta device."""
        topology = self.topology
        config = deepspeed_config(self.settings, topology, self.plan)
        weights = FlatWeights([], shared=False)
        partition: Zero3Partitioner | None = None
        if self.zero_stage == 3:
            partition = Zero3Partitioner(config, topology, dtype)
            with no_weight_broadcast():
                materialize(model, topology.device, partition)
        else:
            weights = materialize_flat(model, self.groups, topology)
        self._adam = _adamw(model, self._groups, self.settings.optimizer)
        secondary = None if partition is None else partition.secondary
        with built_empty(weights.flats, topology.device, secondary):
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self._adam,
                config=config,
                mpu=topology,
                dist_init_required=False,
            )
        if partition is not None:
            partition.finish(engine)
        norms = [group.scale.norm for group in self._groups]
        set_norm_weights(engine.optimizer, self.zero_stage, norms)
        if weights.shared:
            engine.optimizer.shared_weights = True
        return engine

    def forward(self, *inputs: Any) -> Tensor:
        """Return logits (B, S, V/tp) for (input_ids, position_ids, documents, rank masks).

        With a fifth input, a head loss, return its result instead.
        """
        device = self.topology.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._autocast):
            return self._engine(*inputs)

    def begin_step(self, passes: int) -> None:
        """Begin a step of `passes` micro-batches of this rank; call before its first one.

        Their number may differ from step to step; before the first call it is that of the settings.
        """
        if self.zero_stage == 0:
            self._engine.begin_step(passes)
            return
        per_pass = self.settings.batch.micro_batch_size * self.topology.dp
        self._engine.set_train_batch_size(passes * per_pass)
        self._engine.micro_steps = 0  # DeepSpeed takes it modulo the number of micro-batches

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch; micro-batches are averaged."""
        self._engine.backward(loss)

    def step(self, lr: float) -> Tensor | None:
        """Finish a micro-batch; update the weights after the last one of a step.

        Returns None between micro-batches, else the global L2 gradient norm before clipping,
        weighted by the parameters' scales: a scalar on the device, which only ZeRO 3 has read. If
        the norm is not finite, which all ranks see alike, the state is unchanged and the gradients
        are dropped.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        if boundary:
            for values, group in zip(self._adam.param_groups, self._groups, strict=True):
                values |= group.hyper_parameters(self.settings.optimizer, lr)
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm()) if boundary else None

    def before_update(self, action: Callable[[], None]) -> None:
        """Call `action` before each update, the only change of the state of a ready engine."""
        self._adam.register_step_pre_hook(lambda *_: action())

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation mode, as nn.Module.train."""
        self._engine.train(mode)

    def storage(self) -> Storage:
        """Return this rank's shard of every parameter's state as views of the optimizer's tensors.

        They are on the engine's device, or on the CPU with `offload_optimizer`.
        """
        out: Storage = {}
        for fragment in self._fragments():
            if fragment.numel > 0:
                state = self._adam.state[fragment.owner]
                tensors = (fragment.owner.data, state["exp_avg"], state["exp_avg_sq"])
                parts = (fragment.of(tensor) for tensor in tensors)
                out[fragment.name] = dict(zip(STATE_KINDS, parts, strict=True))
        return out

    def intervals(self) -> dict[str, range]:
        """Return this rank's interval of each parameter's flattened slice, read from DeepSpeed."""
        held = (fragment for fragment in self._fragments() if fragment.numel > 0)
        return {f.name: range(f.start, f.start + f.numel) for f in held}

    def mark_new(self, masks: Mapping[str, Tensor]) -> None:
        """Register the new entries for `set_update_factors`; call once.

        `masks` maps parameters to (n,) bool in the order and on the device of the storage.
        Parameters without a mask are entirely old.
        """
        held = [fragment for fragment in self._fragments() if fragment.numel > 0]
        self._factors.register(
            (f.owner, ScaledPart(f.of(f.owner.data), masks.get(f.name))) for f in held
        )

    def set_update_factors(self, new: float = 1.0, old: float = 1.0) -> None:
        """Scale the updates of new and old entries in the following steps; requires `mark_new`.

        A factor on the update equals a factor on the learning rate; at 0 the bits are unchanged.
        """
        self._factors.set(new, old)

    @property
    def adam_step(self) -> int:
        """Step count of Adam's bias correction, equal for all parameters."""
        steps = {int(state["step"]) for state in self._adam.state.values()}
        if len(steps) != 1:
            raise AssertionError(f"rank {self.topology.rank}: Adam's steps differ: {steps}")
        return steps.pop()

    def ready(self, adam_step: int) -> None:
        """Set Adam's step and refresh the forward weights; call after writing the storage."""
        for state in self._adam.state.values():
            state["step"].fill_(adam_step)
        refresh(self._engine.optimizer, self.zero_stage)

    def release(self) -> Storage:
        """Destroy the engine and return its state; all other memory is freed."""
        storage = self.storage()
        self._engine.destroy()
        if self.zero_stage == 3:
            unlink_zero3(self._engine)
        del self._engine, self._adam, self._fragments, self._factors
        gc.collect()
        return storage

    def _create_moments(self) -> None:
        # A fresh engine has no moments (DeepSpeed creates them in the first step).
        for owner in {id(f.owner): f.owner for f in self._fragments()}.values():
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
