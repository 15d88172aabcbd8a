"""Where DeepSpeed's ZeRO partitions keep every number, and how they are written to. No other file
knows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagrow.parallel.deepspeed_import import BF16_Optimizer, deepspeed
from megagrow.parallel.process_groups import Topology

GATHER_BYTES = 64 * 2**20
"""Forward weights that are gathered at once when they are refreshed."""


@dataclass(frozen=True)
class Fragment:
    """Where DeepSpeed keeps a rank's part of a parameter: `numel` elements from `offset` of one of
    the tensors that it optimises; they begin at `start` of the parameter's flattened slice."""

    name: str
    start: int
    numel: int
    owner: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """This part of the owner, or of a tensor beside it: (numel,), a view."""
        return flat.view(-1).narrow(0, self.offset, self.numel)


def places(engine: Any, zero_stage: int) -> Iterator[Fragment]:
    """The place of each parameter of an engine, in the model's order."""
    locate = {0: _place_whole, 3: _place_zero3}.get(zero_stage, _place_flat)
    for name, parameter in engine.module.named_parameters():
        yield locate(name, parameter, engine.optimizer)


def _place_whole(name: str, parameter: Tensor, _: Any) -> Fragment:
    return Fragment(name, 0, parameter.numel(), parameter, 0)


def _place_flat(name: str, parameter: Any, optimizer: Any) -> Fragment:
    mapping = parameter._hp_mapping
    flats = [group["params"][0] for group in optimizer.param_groups]
    if mapping is None:
        return Fragment(name, 0, 0, flats[0], 0)
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(name, low.start, low.numel, flats[mapping.param_group_index], high.start)


def _place_zero3(name: str, parameter: Any, optimizer: Any) -> Fragment:
    group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
    rank = dist.get_rank(parameter.ds_process_group)
    start = min(rank * share, parameter.ds_numel)
    numel = min(share, parameter.ds_numel - start)  # the last rank's share ends in padding
    return Fragment(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def partition_zero3(
    config: dict[str, Any], topology: Topology, dtype: torch.dtype
) -> Callable[[nn.Module], None]:
    """What splits the weights of a module over the data-parallel ranks.

    What a rank keeps has no memory until `empty_engine.built_empty` gives it some.
    """

    def partition(module: nn.Module) -> None:
        deepspeed.zero.Init(
            module=module,
            data_parallel_group=topology.dp_group,
            mpu=topology,
            remote_device="meta",
            dtype=dtype,
            config_dict_or_path=config,
        )

    return partition


def refresh(optimizer: Any, zero_stage: int, topology: Topology) -> None:
    """Passes the fp32 weights on to the forward weights of all ranks."""
    if zero_stage == 3:
        for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    elif zero_stage > 0:
        _refresh_flat(optimizer, topology)


def _refresh_flat(optimizer: Any, topology: Topology) -> None:
    """In pieces, since gloo gathers into a second copy of what it gathers."""
    if isinstance(optimizer, BF16_Optimizer):  # DeepSpeed's choice for ZeRO 1 in bf16
        masters, shares = optimizer.fp32_groups_flat_partition, optimizer.bf16_partitioned_groups
    else:
        masters = optimizer.single_partition_of_fp32_groups
        shares = optimizer.parallel_partitioned_bit16_groups
    for parts, master in zip(shares, masters, strict=True):
        # The flat tensor of a group of one is that parameter itself, which autograd watches.
        parts = [part.data for part in parts]
        mine = parts[topology.dp_rank]
        mine.copy_(master.data)
        piece = max(1, GATHER_BYTES // (topology.dp * mine.element_size()))
        for start in range(0, mine.numel(), piece):
            pieces = [part[start : start + piece] for part in parts]
            dist.all_gather(pieces, pieces[topology.dp_rank], group=topology.dp_group)


def forget_gradients(optimizer: Any, zero_stage: int) -> None:
    """Call after a step that DeepSpeed has skipped, as the gradient was not finite.

    With an offloaded optimizer under ZeRO 1 and 2 in bf16 it keeps the tensor in which it sums
    gradients up (0.19.8): one NaN would be in it for ever.
    """
    if zero_stage in (1, 2) and not isinstance(optimizer, BF16_Optimizer):
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)


def unlink_zero3(engine: Any) -> None:
    """Cuts a destroyed engine's modules off its memory.

    DeepSpeed keeps the modules for ever, in a list and in a cache of its own. Through hooks, and
    through what it marks parameters with, they would keep the engine and all its state.
    """
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    for parameter in engine.module.parameters():
        parameter.data = parameter.data.new_empty(0)
        parameter.__dict__.clear()
