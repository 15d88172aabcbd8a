"""DeepSpeed's engine, and where its ZeRO partitions keep every number. The only file that knows.

An engine is built empty. Its state (fp32 weights, Adam's moments and step) is then written into
the partitions in place: by the initialiser, from a checkpoint, or by a reshard. `ready` passes the
written weights on to the copies that the forward pass uses.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrow.config.schema import OptimizerConfig
from megagrow.model.masks import Masks
from megagrow.parallel.plan import parameter_plan
from megagrow.parallel.settings import EngineSettings, decay_groups, deepspeed_config
from megagrow.parallel.topology import Topology, choose_accelerator
from megagrow.parallel.weights import build_model, materialise, materialise_flat

choose_accelerator()
import deepspeed  # noqa: E402
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer  # noqa: E402
from deepspeed.runtime.utils import clip_grad_norm_  # noqa: E402
from deepspeed.runtime.zero import stage_1_and_2  # noqa: E402

# DeepSpeed 0.19 still calls collectives under names that torch 2.13 deprecates.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# DeepSpeed's shared-memory all-reduce serves inference on CPUs only. Building it would cost every
# fresh machine a compiler and most of a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

STATE_KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""What is kept of every parameter, under the names of DeepSpeed's universal checkpoint."""

GATHER_BYTES = 64 * 2**20
"""Forward weights that are gathered at once when they are refreshed."""


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
        self.groups = decay_groups(self.plan, settings.optimizer)
        config = deepspeed_config(settings, topology, self.plan)
        model = build_model(self.plan, settings, topology, dtype)
        flats: list[Tensor] = []
        if self.stage in (1, 2):
            flats = materialise_flat(model, self.groups, topology)
        else:
            partition = _partition_zero3(config, topology, dtype) if self.stage == 3 else None
            materialise(model, topology.device, partition)
        optimizer = _adamw(model, self.groups, settings.optimizer, topology.device)
        with _flat_already(flats):
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=config,
                mpu=topology,
                dist_init_required=False,
            )
        self._adam = optimizer
        self._create_moments()

    def forward(self, *inputs: Tensor | Masks | None) -> Tensor:
        """Logits (B, S, V/tp) for (input_ids, position_ids, document_ids, this rank's masks)."""
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
            _refresh_flat(optimizer, self.topology)

    def release(self) -> Storage:
        """Destroys the engine and returns its state, now all that is left of it in memory."""
        storage = self.storage()
        self._engine.destroy()
        if self.stage == 3:
            _unlink_zero3(self._engine)
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
    rank = dist.get_rank(parameter.ds_process_group)
    start = min(rank * share, parameter.ds_numel)
    numel = min(share, parameter.ds_numel - start)  # the last rank's share ends in padding
    return _Place(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def _tensor(adam: torch.optim.Optimizer, owner: Tensor, kind: str) -> Tensor:
    return owner.data if kind == "fp32" else adam.state[owner][kind]


def _partition_zero3(
    config: dict[str, Any], topology: Topology, dtype: torch.dtype
) -> Callable[[nn.Module], None]:
    """What splits the weights of a module over the data-parallel ranks."""

    def partition(module: nn.Module) -> None:
        deepspeed.zero.Init(
            module=module,
            data_parallel_group=topology.dp_group,
            mpu=topology,
            dtype=dtype,
            config_dict_or_path=config,
        )

    return partition


def _unlink_zero3(engine: Any) -> None:
    """Cuts a destroyed engine's modules off its memory.

    DeepSpeed keeps the modules for ever, in a list and in a cache of its own. Through hooks, and
    through what it marks parameters with, they would keep the engine and all its state.
    """
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for parameter in engine.module.parameters():
        parameter.data = parameter.data.new_empty(0)
        parameter.__dict__.clear()


@contextmanager
def _flat_already(flats: list[Tensor]) -> Iterator[None]:
    """Lets DeepSpeed take the flat groups as they are, in their order.

    By itself it makes flat copies: the weights would be held twice while the engine is built.
    """
    original, waiting = stage_1_and_2._flatten_dense_tensors, list(flats)

    def flatten(tensors: list[Tensor]) -> Tensor:
        return waiting.pop(0) if waiting else original(tensors)

    stage_1_and_2._flatten_dense_tensors = flatten
    try:
        yield
    finally:
        stage_1_and_2._flatten_dense_tensors = original


def _refresh_flat(optimizer: Any, topology: Topology) -> None:
    """Passes the fp32 weights on to the forward weights of all ranks, under ZeRO 1 and 2.

    In pieces, since gloo gathers into a second copy of what it gathers.
    """
    if isinstance(optimizer, BF16_Optimizer):  # DeepSpeed's choice for ZeRO 1 in bf16
        masters, shares = optimizer.fp32_groups_flat_partition, optimizer.bf16_partitioned_groups
    else:
        masters = optimizer.single_partition_of_fp32_groups
        shares = optimizer.parallel_partitioned_bit16_groups
    for parts, master in zip(shares, masters, strict=True):
        mine = parts[topology.dp_rank]
        mine.copy_(master.data)
        piece = max(1, GATHER_BYTES // (topology.dp * mine.element_size()))
        for start in range(0, mine.numel(), piece):
            pieces = [part[start : start + piece] for part in parts]
            dist.all_gather(pieces, pieces[topology.dp_rank], group=topology.dp_group)


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
