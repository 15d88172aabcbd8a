"""Training engine of a model under any ZeRO stage, with access to this rank's shard of its state.

An engine is built empty. Its state (fp32 weights, optimizer state and step) is then written into
the partitions in place: by initialization, from a checkpoint, or by a reshard. `ready` copies the
written weights to the forward weights.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megagrow.model.decoder import CausalLM
from megagrow.parallel.deepspeed_import import deepspeed
from megagrow.parallel.engine_build import built_empty, no_weight_broadcast
from megagrow.parallel.engine_config import (
    NO_RATES,
    EngineSettings,
    deepspeed_config,
    groups_within,
    parameter_groups,
)
from megagrow.parallel.flat_gradients import FlatGradients
from megagrow.parallel.materialize import (
    FlatWeights,
    build_model,
    materialize,
    materialize_flat,
    zeros_like,
)
from megagrow.parallel.optimizers.matrix_exchange import MatrixExchange
from megagrow.parallel.optimizers.muon import MatrixPiece, MuonWithAdamW, build_optimizer
from megagrow.parallel.optimizers.rules import MuonRule, matrix_rule
from megagrow.parallel.partitions import (
    Zero3Partitioner,
    fragments,
    gate_of,
    refresh,
    set_norm_weights,
    unlink_zero3,
)
from megagrow.parallel.pipeline.split import pipeline_split
from megagrow.parallel.pipeline.tied_head import TiedHead
from megagrow.parallel.process_groups import Topology, pipeline_rank_group
from megagrow.parallel.replicated import ReplicatedEngine
from megagrow.parallel.sharding import Partition, Storage, parameter_plan
from megagrow.parallel.update_scaling import ScaledPart, UpdateScaler


class ZeroEngine:
    """Model trained under ZeRO 0, or by DeepSpeed under ZeRO 1, 2 or 3, with tensor parallelism."""

    def __init__(self, settings: EngineSettings, topology: Topology) -> None:
        self.settings = settings
        self.topology = topology
        self.zero_stage = settings.parallel.zero_stage
        self.split = pipeline_split(settings.model, settings.parallel)
        plan = parameter_plan(settings.model, topology.tp, matrix_rule(settings.optimizer))
        groups = parameter_groups(plan, settings.optimizer, settings.scales)
        self._partition = Partition(
            plan,
            tuple(group.names for group in groups),
            self.zero_stage,
            topology.dp,
            topology.tp,
            self.split if topology.pp > 1 else None,
        ).pipeline_parts[topology.pp_rank]
        self.plan, self.groups = self._partition.plan, self._partition.groups
        """Parameters of this pipeline rank, and their optimizer groups."""
        self._groups = groups_within(groups, self.plan)
        # ZeRO 0 keeps no fp32 master weights: there, bf16 is an autocast of fp32.
        self._autocast = settings.bf16 and self.zero_stage == 0
        low_precision = settings.bf16 and not self._autocast
        dtype = torch.bfloat16 if low_precision else torch.float32
        self.hidden_dtype = dtype
        model = build_model(plan, settings, topology, dtype)
        self.chunks = dict(zip(self.split.chunks_of(topology.pp_rank), model.chunks, strict=True))
        is_tied = settings.model.tie_word_embeddings and topology.pp > 1
        self._tied_head = TiedHead(model, topology) if is_tied else None
        self._engine: Any
        if self.zero_stage == 0:
            materialize(model, topology.device, partition=None)
            self._optimizer = build_optimizer(model, self._groups, self.plan, settings.optimizer)
            self._engine = ReplicatedEngine(
                model, self._optimizer, self._groups, settings, topology
            )
        else:
            self._engine = self._partitioned(model, dtype)
        self._fragments = partial(fragments, self._engine, self.zero_stage)
        if self._tied_head is not None and self._tied_head.embedding is not None:
            self._gradients.expect_late(self._tied_head.embedding)
        self._factors = UpdateScaler(self._optimizer)
        self.gate = gate_of(self._engine, self.zero_stage)
        self._create_state()

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
        self._optimizer = build_optimizer(model, self._groups, self.plan, self.settings.optimizer)
        secondary = None if partition is None else partition.secondary
        with built_empty(weights.flats, topology.device, secondary):
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self._optimizer,
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

    @property
    def model(self) -> CausalLM:
        """This rank's share of the model."""
        return self._engine.module

    def forward(self, *inputs: Any) -> Tensor:
        """Return the result of `CausalLM.forward` for the same inputs.

        Without a chunk it is that of the first one of this rank.
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

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Accumulate the gradient of one micro-batch; micro-batches are averaged.

        `last`: it is the last pass of its parameters in the step, in which they are reduced.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, lr: float, others: Mapping[str, float] = NO_RATES) -> Tensor:
        """Update the weights after the last micro-batch of a step. Collective.

        `others` are the rates of parameters whose rate differs from `lr`, by the keys of
        `OptimizerConfig.other_rates`.

        Returns the global L2 gradient norm before clipping, weighted by the parameters' scales: a
        scalar on the device, which only ZeRO 3 has read. If `gate` skips the update, because the
        norm is not finite or a limit is exceeded, which all ranks see alike, the state is unchanged
        and the gradients are dropped.
        """
        for values, group in zip(self._optimizer.param_groups, self._groups, strict=True):
            values |= group.hyper_parameters(self.settings.optimizer, lr, others)
        if self._tied_head is not None:
            self._tied_head.send_gradient(self._gradients.add_late)
        self._engine.step()
        if self._tied_head is not None:
            self._tied_head.send_weight()
        # ZeRO 3 replaces the norm of a skipped step by infinity.
        norm = self.gate.norm
        return torch.as_tensor(self._engine.get_global_grad_norm() if norm is None else norm)

    def before_update(self, action: Callable[[], None]) -> None:
        """Call `action` before each update, the only change of the state of a ready engine."""
        self._optimizer.register_step_pre_hook(lambda *_: action())

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
                state = {"fp32": fragment.owner.data, **self._optimizer.state[fragment.owner]}
                kinds = self.plan[fragment.name].kinds
                out[fragment.name] = {kind: fragment.of(state[kind]) for kind in kinds}
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
        states = self._optimizer.state.values()
        steps = {int(state["step"]) for state in states if "step" in state}
        if len(steps) != 1:
            raise AssertionError(f"rank {self.topology.rank}: Adam's steps differ: {steps}")
        return steps.pop()

    def ready(self, adam_step: int) -> None:
        """Set Adam's step and refresh the forward weights; call after writing the storage.
        Collective."""
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(adam_step)
        refresh(self._engine.optimizer, self.zero_stage)
        if self._tied_head is not None:
            self._tied_head.send_weight()

    def release(self) -> Storage:
        """Destroy the engine and return its state; all other memory is freed."""
        storage = self.storage()
        self._engine.destroy()
        if self.zero_stage == 3:
            unlink_zero3(self._engine)
        del self._engine, self._optimizer, self._fragments, self._factors, self._tied_head
        gc.collect()
        return storage

    def _create_state(self) -> None:
        # A fresh engine has no optimizer state (DeepSpeed creates it in the first step).
        for fragment in self._fragments():
            owner = fragment.owner
            if owner in self._optimizer.state:
                continue
            kinds = self.plan[fragment.name].kinds[1:]
            self._optimizer.state[owner] = {kind: zeros_like(owner) for kind in kinds}
            if "exp_avg" in kinds:
                step = torch.zeros((), dtype=torch.float32, device=owner.device)
                self._optimizer.state[owner]["step"] = step
        if isinstance(self._optimizer, MuonWithAdamW):
            self._optimizer.attach(self._exchange(), self._matrices())

    @property
    def _gradients(self) -> ReplicatedEngine | FlatGradients:
        """Gradients to which one can be added after the backward passes; ZeRO 0, 1 and 2."""
        return self._engine if self.zero_stage == 0 else self._engine.optimizer.gradients

    def _exchange(self) -> MatrixExchange:
        topology = self.topology
        dtype = torch.bfloat16 if self.settings.bf16 else torch.float32
        group = pipeline_rank_group(topology)
        return MatrixExchange(self._partition, group, topology.device, dtype)

    def _matrices(self) -> Iterator[MatrixPiece]:
        for fragment in self._fragments():
            if isinstance(self.plan[fragment.name].rule, MuonRule):
                yield MatrixPiece(
                    fragment.name, fragment.owner, fragment.offset, max(fragment.numel, 0)
                )
