"""DeepSpeed's engine, and where its ZeRO partitions keep every number. The only file that knows.

An engine is built empty. Its state (fp32 weights, Adam's moments and step) is then written into
the partitions in place: by the initialiser, from a checkpoint, or by a reshard. `ready` passes the
written weights on to the copies that the forward pass uses.
"""

import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megagrow.config.schema import BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megagrow.model.llama import LlamaForCausalLM
from megagrow.parallel.layers import parallelize
from megagrow.parallel.plan import ParamSpec, parameter_plan
from megagrow.parallel.topology import Topology, choose_accelerator

choose_accelerator()
import deepspeed  # noqa: E402
from deepspeed.runtime.utils import clip_grad_norm_  # noqa: E402

# DeepSpeed 0.19 still calls collectives under names that torch 2.13 deprecates.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# DeepSpeed's shared-memory all-reduce serves inference on CPUs only. Building it would cost every
# fresh machine a compiler and most of a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

STATE_KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""What is kept of every parameter, under the names of DeepSpeed's universal checkpoint."""


@dataclass(frozen=True)
class EngineSettings:
    """Everything that decides how one stage is trained, besides where its numbers come from."""

    model: ModelConfig
    parallel: ParallelConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    bf16: bool


Storage = dict[str, dict[str, Tensor]]
"""Parameter -> kind of state -> the interval of its flattened slice that this rank holds, 1-D fp32.
A parameter of which it holds nothing is absent."""


@dataclass(frozen=True)
class _Place:
    """Where DeepSpeed keeps a rank's part of a parameter: `numel` elements from `offset` of one of
    the tensors that it optimises; they begin at `start` of the parameter's flattened slice."""

    name: str
    start: int
    numel: int
    owner: Tensor
    offset: int


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
        model = _build_model(self.plan, settings, topology, dtype)
        self.groups = _decay_groups(self.plan, settings.optimizer)
        optimizer = _adamw(model, self.groups, settings.optimizer, topology.device)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_deepspeed_config(settings, topology, self.plan),
            mpu=topology,
            dist_init_required=False,
        )
        self._adam = optimizer
        self._create_moments()

    def forward(self, *inputs: Tensor | None) -> Tensor:
        """Logits (B, S, V/tp) for (input_ids, position_ids, document_ids)."""
        device = self.topology.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._autocast):
            return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of one micro batch; the accumulation's mean is taken."""
        self._engine.backward(loss)

    def step(self, lr: float) -> float | None:
        """Ends a micro batch; where it is the last one, updates the weights.

        Returns the gradient norm before clipping (global, L2) if the weights were updated.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        norm = None
        if boundary:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = lr
            if self.stage == 0:
                norm = self._clip_stage0()
        self._engine.step()
        if boundary and self.stage > 0:
            norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def train(self, mode: bool = True) -> None:
        """Switches between training and evaluation, as nn.Module.train."""
        self._engine.train(mode)

    def storage(self) -> Storage:
        """This rank's part of every parameter's state: views of the optimizer's own tensors."""
        return {
            place.name: {
                kind: _tensor(self._adam, place.owner, kind)
                .view(-1)
                .narrow(0, place.offset, place.numel)
                for kind in STATE_KINDS
            }
            for place in self._places()
            if place.numel > 0
        }

    def intervals(self) -> dict[str, range]:
        """Which interval of its flattened slice this rank holds of each parameter, by DeepSpeed's
        own bookkeeping."""
        return {p.name: range(p.start, p.start + p.numel) for p in self._places() if p.numel > 0}

    @property
    def adam_step(self) -> int:
        """Updates that Adam's bias correction counts."""
        return int(next(iter(self._adam.state.values()))["step"])

    def ready(self, adam_step: int) -> None:
        """Call after writing the storage: sets Adam's step, refreshes the forward weights."""
        for state in self._adam.state.values():
            state["step"].fill_(adam_step)
        optimizer = self._engine.optimizer
        if self.stage == 3:
            for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        elif self.stage > 0:
            optimizer.update_lp_params()

    def release(self) -> Storage:
        """Destroys the engine and returns its state, now all that is left of it in memory."""
        storage = self.storage()
        self._engine.destroy()
        del self._engine, self._adam
        gc.collect()
        return storage

    def _clip_stage0(self) -> float:
        limit = self.settings.optimizer.gradient_clipping
        parameters = list(self._engine.module.parameters())
        return clip_grad_norm_(parameters, max_norm=limit or float("inf"), mpu=self.topology)

    def _create_moments(self) -> None:
        # A fresh engine has no moments (DeepSpeed makes them in the first step).
        device = self.topology.device
        for owner in {id(place.owner): place.owner for place in self._places()}.values():
            self._adam.state[owner] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(owner, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(owner, requires_grad=False),
            }

    def _places(self) -> Iterator[_Place]:
        named = [(name, parameter) for name, parameter in self._engine.module.named_parameters()]
        locate = {0: _place_whole, 3: _place_zero3}.get(self.stage, _place_flat)
        return (locate(name, parameter, self._engine.optimizer) for name, parameter in named)


def _place_whole(name: str, parameter: Tensor, _: Any) -> _Place:
    return _Place(name, 0, parameter.numel(), parameter, 0)


def _place_flat(name: str, parameter: Any, optimizer: Any) -> _Place:
    mapping = parameter._hp_mapping
    flats = [group["params"][0] for group in optimizer.param_groups]
    if mapping is None:
        return _Place(name, 0, 0, flats[0], 0)
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return _Place(name, low.start, low.numel, flats[mapping.param_group_index], high.start)


def _place_zero3(name: str, parameter: Any, optimizer: Any) -> _Place:
    group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    start = min(rank * share, parameter.ds_numel)
    numel = min(share, parameter.ds_numel - start)  # the last rank's share ends in padding
    return _Place(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def _tensor(adam: torch.optim.Optimizer, owner: Tensor, kind: str) -> Tensor:
    return owner.data if kind == "fp32" else adam.state[owner][kind]


def _build_model(
    plan: dict[str, ParamSpec], settings: EngineSettings, topology: Topology, dtype: torch.dtype
) -> LlamaForCausalLM:
    """This rank's share of the model, zero-filled; under ZeRO-3 one layer at a time is whole."""
    recompute = settings.parallel.activation_checkpointing
    with torch.device("meta"):
        model = LlamaForCausalLM(settings.model, recompute).to(dtype)
    parallelize(model, plan, topology, settings.parallel.sequence_parallel)
    parts: list[nn.Module] = [*model.model.layers, model]
    for part in parts:
        _materialise(part, topology.device)
        if settings.parallel.zero_stage == 3:
            deepspeed.zero.Init(
                module=part,
                data_parallel_group=topology.dp_group,
                mpu=topology,
                dtype=dtype,
                config_dict_or_path=_deepspeed_config(settings, topology, plan),
            )
    return model


def _materialise(part: nn.Module, device: torch.device) -> None:
    for parameter in part.parameters():
        if parameter.is_meta:
            # Zeros on the real device, under the same Parameter object (tied weights, marks).
            real = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
            torch.utils.swap_tensors(parameter, _marked(real, parameter))


def _marked(real: Tensor, like: nn.Parameter) -> nn.Parameter:
    parameter = nn.Parameter(real)
    parameter.__dict__.update(like.__dict__)
    return parameter


def _decay_groups(
    plan: dict[str, ParamSpec], optimizer: OptimizerConfig
) -> tuple[tuple[str, ...], ...]:
    """Names of each optimizer group: those with weight decay, then those without, if any."""
    if optimizer.weight_decay_on == "all":
        return (tuple(plan),)
    decayed = tuple(name for name, spec in plan.items() if not spec.is_vector)
    return decayed, tuple(name for name in plan if name not in decayed)


def _adamw(
    model: nn.Module,
    groups: tuple[tuple[str, ...], ...],
    config: OptimizerConfig,
    device: torch.device,
) -> torch.optim.AdamW:
    named = dict(model.named_parameters())
    decays = (config.weight_decay, 0.0)
    return torch.optim.AdamW(
        [
            {"params": [named[name] for name in names], "weight_decay": decay}
            for names, decay in zip(groups, decays, strict=False)
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def _deepspeed_config(
    settings: EngineSettings, topology: Topology, plan: dict[str, ParamSpec]
) -> dict[str, Any]:
    batch = settings.batch
    slice_numel = sum(spec.slice_numel(topology.tp) for spec in plan.values())
    bucket = min(slice_numel + slice_numel % 2, 200_000_000)  # elements; more gains nothing
    stage = settings.parallel.zero_stage
    return {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_clipping": settings.optimizer.gradient_clipping if stage > 0 else 0.0,
        "bf16": {"enabled": settings.bf16 and stage > 0},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
