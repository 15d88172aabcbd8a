"""What a rank holds of a parameter, beside its place in the whole one."""

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

from megagrow.growth.map import Kind
from megagrow.reshard.copy_ops import block_view
from megagrow.reshard.exchange import Side


def held_parts(
    name: str, kind: Kind, whole: Tensor, source: Side
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of `whole` (rows, cols) and, on its device, what this rank holds of them, as views.

    Of numbers that several ranks hold only one has them: the parts of all ranks make the whole.
    """
    layout, rank = source.layout, dist.get_rank()
    if name not in source.storage or not layout.writes(name, rank):
        return
    stored = source.storage[name][kind]
    for block in layout.blocks(name, rank):
        place = layout.local(name, rank, block)
        rows, cols = (slice(span.start, span.stop) for span in block)
        yield whole[rows, cols], block_view(stored, block, *place).to(whole.device)
