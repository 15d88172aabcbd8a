"""Apply a function to complete matrices whose elements are sharded over the ranks.

Each matrix is computed once, by one rank: the owners are chosen among all data- and tensor-parallel
ranks so that their costs are balanced. Ranks send their pieces to the owner and receive their
pieces of the result, by all-to-all, in rounds of bounded memory. All replicas therefore receive the
same bits, which do not depend on the layout.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from megagrow.parallel.sharding import ParamSpec, Partition

ROUND_ELEMENTS = 2**24
"""Elements of the matrices that a rank computes in one round; at least one matrix."""

Function = Callable[[str, Tensor], Tensor]
"""(name, complete matrix (rows, cols)) -> matrix of the same shape."""


@dataclass(frozen=True)
class _MatrixRound:
    """Matrices of one round by owner, and the elements exchanged with each rank."""

    matrices: tuple[tuple[str, ...], ...]
    lent: list[int]
    """Elements that this rank sends to each owner, and the owner returns with more replicas."""
    collected: list[int]
    """Elements of its matrices that this rank receives from each rank."""
    returned: list[int]
    """Elements of results that this rank sends to each rank."""
    results: list[int]
    """Elements of results that this rank receives from each owner."""


class MatrixExchange:
    """Matrices sharded as in a partition.

    Args:
        partition: the shards of all ranks of a group, without pipeline parallelism.
        group: the ranks, in the order of the partition; all of them take part.
        device: device of the computation and of the process group.
        dtype: dtype in which matrices are sent and computed.
        most: elements of the matrices that a rank computes in one round.
    """

    def __init__(
        self,
        partition: Partition,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        most: int = ROUND_ELEMENTS,
    ) -> None:
        self._partition, self._group, self._rank = partition, group, group.rank()
        self._device, self._dtype = device, dtype
        # Without ZeRO, every data-parallel rank receives all results of a round.
        self._most = most if partition.zero_stage else most // partition.dp
        self._world = partition.dp * partition.tp
        self._rounds = lru_cache(maxsize=None)(self._plan)

    def apply(self, pieces: Mapping[str, Tensor], function: Function) -> None:
        """Replace this rank's pieces of matrices by those of the function's results. Collective.

        `pieces` maps each matrix to this rank's interval of its flattened slice, (n,), also if it
        is empty. All ranks pass the same matrices in the same order.
        """
        for each in self._rounds(tuple(pieces)):
            held = self._collect(each, pieces)
            results = {name: function(name, held.pop(name)) for name in tuple(held)}
            self._return(each, results, pieces)

    def _collect(self, now: _MatrixRound, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the complete matrices that this rank owns in a round."""
        sent = self._empty(sum(now.lent))
        parts = [
            pieces[name]
            for owner, names in enumerate(now.matrices)
            for name in names
            if self._lent(name, self._rank, owner)
        ]
        _fill(sent, parts)
        received = self._empty(sum(now.collected))
        dist.all_to_all_single(received, sent, now.collected, now.lent, group=self._group)
        own = now.matrices[self._rank]
        flats: dict[str, list[list[Tensor]]] = {
            name: [[] for _ in range(self._partition.tp)] for name in own
        }
        for peer, buffer in enumerate(received.split(now.collected)):
            lengths = [len(self._lent(name, peer, self._rank)) for name in own]
            for name, part in zip(own, buffer.split(lengths), strict=True):
                flats[name][peer % self._partition.tp].append(part)
        return {name: self._joined(name, slices) for name, slices in flats.items()}

    def _joined(self, name: str, slices: list[list[Tensor]]) -> Tensor:
        """Return a matrix from the parts of its tensor-parallel slices, by data-parallel rank."""
        spec, tp = self._partition.plan[name], self._partition.tp
        shape = spec.slice_shape(tp)
        if spec.tp_dim is None:
            return torch.cat(slices[self._rank % tp]).view(shape)
        return torch.cat([torch.cat(parts).view(shape) for parts in slices], spec.tp_dim)

    def _return(
        self, now: _MatrixRound, results: Mapping[str, Tensor], pieces: Mapping[str, Tensor]
    ) -> None:
        """Send the results to all ranks that hold pieces of them, and store the received ones."""
        sent = self._empty(sum(now.returned))
        _fill(sent, (part for peer in range(self._world) for part in self._parts(results, peer)))
        received = self._empty(sum(now.results))
        dist.all_to_all_single(received, sent, now.results, now.returned, group=self._group)
        offset = 0
        for name in (name for names in now.matrices for name in names):
            piece = pieces[name]
            piece.copy_(received.narrow(0, offset, len(piece)))
            offset += len(piece)

    def _parts(self, results: Mapping[str, Tensor], peer: int) -> Iterator[Tensor]:
        """Yield the pieces of results that a rank holds."""
        tp_rank = peer % self._partition.tp
        for name, full in results.items():
            spec, tp = self._partition.plan[name], self._partition.tp
            dim = spec.tp_dim
            part = full if dim is None else full.chunk(tp, dim)[tp_rank]
            interval = self._partition.interval(name, peer)
            yield part.reshape(-1)[interval.start : interval.stop]

    def _empty(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self._dtype, device=self._device)

    def _lent(self, name: str, rank: int, owner: int) -> range:
        """Return the interval that a rank sends to an owner; one replica of each element does."""
        layout = self._partition
        dp_rank, tp_rank = divmod(rank, layout.tp)
        other_slice = layout.plan[name].tp_dim is None and tp_rank != owner % layout.tp
        other_replica = layout.zero_stage == 0 and dp_rank != owner // layout.tp
        return range(0) if other_slice or other_replica else layout.interval(name, rank)

    def _plan(self, names: tuple[str, ...]) -> list[_MatrixRound]:
        owned = assigned([self._partition.plan[name] for name in names], self._world)
        chunks = [list(_chunks(specs, self._most)) for specs in owned]
        return [self._round(each) for each in zip_longest(*chunks, fillvalue=())]

    def _round(self, matrices: tuple[tuple[str, ...], ...]) -> _MatrixRound:
        ranks, layout, own = range(self._world), self._partition, matrices[self._rank]

        def held(names: Sequence[str], rank: int) -> int:
            return sum(len(layout.interval(name, rank)) for name in names)

        def lent(names: Sequence[str], rank: int, owner: int) -> int:
            return sum(len(self._lent(name, rank, owner)) for name in names)

        return _MatrixRound(
            matrices,
            lent=[lent(matrices[owner], self._rank, owner) for owner in ranks],
            collected=[lent(own, rank, self._rank) for rank in ranks],
            returned=[held(own, rank) for rank in ranks],
            results=[held(matrices[owner], self._rank) for owner in ranks],
        )


def assigned(matrices: Sequence[ParamSpec], ranks: int) -> list[list[ParamSpec]]:
    """Return the matrices that each rank computes, the most expensive first.

    Each matrix goes to the rank with the least work so far. Its cost is that of products with the
    Gram matrix of its shorter side.
    """
    costs = {spec: spec.rows * spec.cols * min(spec.rows, spec.cols) for spec in matrices}
    work, owned = [0] * ranks, [list[ParamSpec]() for _ in range(ranks)]
    for spec in sorted(matrices, key=lambda spec: -costs[spec]):
        rank = work.index(min(work))
        work[rank] += costs[spec]
        owned[rank].append(spec)
    return owned


def _chunks(matrices: Sequence[ParamSpec], most: int) -> Iterator[tuple[str, ...]]:
    """Split the matrices of a rank into rounds of at most `most` elements, or one matrix."""
    names: list[str] = []
    elements = 0
    for spec in matrices:
        numel = spec.rows * spec.cols
        if names and elements + numel > most:
            yield tuple(names)
            names, elements = [], 0
        names.append(spec.name)
        elements += numel
    if names:
        yield tuple(names)


def _fill(buffer: Tensor, parts: "Iterator[Tensor] | Sequence[Tensor]") -> None:
    offset = 0
    for part in parts:
        buffer.narrow(0, offset, len(part)).copy_(part)
        offset += len(part)
