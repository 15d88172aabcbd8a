"""Location and access of parameter state in DeepSpeed's ZeRO partitions.

The only module that depends on DeepSpeed's internal layout of partitions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrow.model.layers.modules import LayerModule, RMSNorm
from megagrow.parallel.deepspeed_import import deepspeed, stage3
from megagrow.parallel.engine_build import secondary_group
from megagrow.parallel.process_groups import Topology, data_parallel_subgroup
from megagrow.parallel.update_scaling import StepGate


@dataclass(frozen=True)
class Fragment:
    """Location of a rank's part of a parameter in DeepSpeed's partitions.

    `numel` elements at `offset` of `owner`, one of the optimizer's tensors; the first is element
    `start` of the parameter's flattened slice.
    """

    name: str
    start: int
    numel: int
    owner: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """Return this part of the owner or of a tensor of the same layout: (numel,), a view."""
        return flat.view(-1).narrow(0, self.offset, self.numel)


def fragments(engine: Any, zero_stage: int) -> Iterator[Fragment]:
    """Yield the fragment of each parameter of an engine, in model order."""
    locate = {0: _replicated, 3: _zero3_fragment}.get(zero_stage) or _flat_fragment(engine)
    for name, parameter in engine.module.named_parameters():
        yield locate(name, parameter, engine.optimizer)


def _replicated(name: str, parameter: Tensor, _: Any) -> Fragment:
    return Fragment(name, 0, parameter.numel(), parameter, 0)


def _flat_fragment(engine: Any) -> Callable[[str, Any, Any], Fragment]:
    groups = zip(engine.optimizer.param_groups, engine.optimizer.bit16_groups, strict=True)
    flat_of = {id(member): group["params"][0] for group, members in groups for member in members}

    def locate(name: str, parameter: Any, _: Any) -> Fragment:
        flat, mapping = flat_of[id(parameter)], parameter._hp_mapping
        if mapping is None:
            return Fragment(name, 0, 0, flat, 0)
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(name, low.start, low.numel, flat, high.start)

    return locate


def _zero3_fragment(name: str, parameter: Any, optimizer: Any) -> Fragment:
    group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
    rank = dist.get_rank(parameter.ds_process_group)
    start = min(rank * share, parameter.ds_numel)
    numel = min(share, parameter.ds_numel - start)  # the last rank's share ends in padding
    return Fragment(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


class Zero3Partitioner:
    """Partition the weights of modules over the data-parallel ranks.

    The partitions have no memory until `engine_build.built_empty` allocates it. `secondary` is the
    group of hpZ, None without it.
    """

    def __init__(self, config: dict[str, Any], topology: Topology, dtype: torch.dtype) -> None:
        self._config = config
        self._topology = topology
        self._dtype = dtype
        self._contexts: list[Any] = []
        size = config["zero_optimization"]["zero_hpz_partition_size"]
        self.secondary = data_parallel_subgroup(topology, size) if size > 1 else None

    def __call__(self, module: nn.Module) -> None:
        """Partition a module's weights."""
        with secondary_group(self.secondary):
            context = deepspeed.zero.Init(
                module=module,
                data_parallel_group=self._topology.dp_group,
                mpu=self._topology,
                remote_device="meta",
                dtype=self._dtype,
                config_dict_or_path=self._config,
                zero_param_parallel_group=self.secondary,
            )
        self._contexts.append(context)

    def finish(self, engine: Any) -> None:
        """Complete a new engine; once.

        A block's weights are gathered for the block instead of for the modules that own them, since
        it reads several at a time. The gains of norms stay gathered: the backward pass reads them
        without hooks. DeepSpeed allocates the second copies of hpZ, which it has put on the meta
        device.
        """
        for module in engine.module.modules():
            if isinstance(module, LayerModule):
                for parameter in module.parameters():
                    deepspeed.zero.register_external_parameter(module, parameter)
            elif isinstance(module, RMSNorm):
                gain: Any = module.weight
                gain.is_external_param = True  # DeepSpeed releases none of these
        if self.secondary is not None:
            engine.optimizer.invalidate_secondary_tensor()
            for context in self._contexts:
                context.remote_device = self._topology.device


def set_norm_weights(optimizer: Any, zero_stage: int, weights: Sequence[float]) -> None:
    """Set the group weights of the gradient norm of a ZeRO 1, 2 or 3 optimizer, in group order."""
    if all(weight == 1 for weight in weights):
        return
    if zero_stage < 3:
        optimizer.norm_weights = weights
        return
    norms = optimizer._get_norm_groups  # of sub-groups, the parts of a group updated in turn

    def weighted() -> list[Any]:
        group_of = optimizer.sub_group_to_group_id
        return [norm * weights[group_of[index]] ** 0.5 for index, norm in enumerate(norms())]

    optimizer._get_norm_groups = weighted


def gate_of(engine: Any, zero_stage: int) -> StepGate:
    """Return the gate of the updates of an engine; call once, after `set_norm_weights`."""
    if zero_stage < 3:
        return (engine.optimizer if zero_stage else engine).gate
    optimizer, gate = engine.optimizer, StepGate()
    norms = optimizer._get_norm_groups

    def gated() -> list[Any]:
        """Return norms that are infinite if a limit is exceeded: DeepSpeed then drops the step."""
        parts = norms()
        if not gate.limited:
            return list(parts)
        total = torch.as_tensor(stage3.combine_grad_norm_groups(parts))
        factor = torch.where(gate.skips(total), torch.inf, 1.0)
        return [part * factor for part in parts]

    optimizer._get_norm_groups = gated
    return gate


def refresh(optimizer: Any, zero_stage: int) -> None:
    """Copy the fp32 weights to the forward weights of all ranks. Collective."""
    if zero_stage == 3:
        for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    elif zero_stage > 0:
        optimizer.refresh()


def unlink_zero3(engine: Any) -> None:
    """Release the memory of a destroyed ZeRO 3 engine.

    DeepSpeed keeps the modules in global lists and caches. Their hooks and the attributes of their
    parameters would keep the engine and its state alive.
    """
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for parameter in engine.module.parameters():
        parameter.data = parameter.data.new_empty(0)
        parameter.__dict__.clear()
