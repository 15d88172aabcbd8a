"""Process groups on a cluster, and the time of their collectives."""

from dataclasses import dataclass

from megagrow.planning.cluster import Cluster
from megagrow.planning.step.rates import COLLECTIVE_SECONDS, NIC_SHARE, NVLINK_SHARE


@dataclass(frozen=True)
class CommGroup:
    """Process group of `size` ranks, `local` of which share a node."""

    cluster: Cluster
    size: int
    local: int

    @property
    def nodes(self) -> int:
        return -(-self.size // self.local)

    def one_way(self, size: float) -> float:
        """Return the seconds of an all-gather to, or reduce-scatter of, `size` bytes per rank.

        A rank receives all bytes but its own over NVLink. A node receives the bytes of other nodes
        once, over the network cards of its ranks in the group. Both overlap, so the slower link
        determines the time.
        """
        if self.size == 1:
            return 0.0
        card = self.cluster.card
        links = 1.0 if card.nvswitch else (self.local - 1) / max(1, self.cluster.gpus_per_node - 1)
        inner = size * (self.size - 1) / self.size
        outer = size * (self.nodes - 1) / self.nodes / (self.local * card.nic * NIC_SHARE)
        seconds = COLLECTIVE_SECONDS + self.cluster.latency * (self.nodes - 1)
        if self.local > 1:
            outer = max(outer, inner / (card.nvlink * NVLINK_SHARE * links))
        return seconds + outer

    def all_reduce(self, size: float) -> float:
        """Return the seconds of an all-reduce of `size` bytes: reduce-scatter and all-gather."""
        return 2 * self.one_way(size)

    def all_to_all(self, size: float) -> float:
        """Return the seconds of an all-to-all of `size` bytes per rank.

        Each rank sends an equal part to every rank; those to other nodes
        leave over its own network card.
        """
        if self.size == 1:
            return 0.0
        card = self.cluster.card
        seconds = COLLECTIVE_SECONDS + self.cluster.latency * (self.nodes - 1)
        inner = size * (self.local - 1) / self.size / (card.nvlink * NVLINK_SHARE)
        outer = size * (self.size - self.local) / self.size / (card.nic * NIC_SHARE)
        return seconds + max(inner, outer)


def tensor_group(cluster: Cluster, tp: int) -> CommGroup:
    """Return the group of tensor-parallel ranks: neighbors, within one node where they fit."""
    return CommGroup(cluster, tp, min(tp, cluster.gpus_per_node))


def strided_group(cluster: Cluster, size: int, stride: int) -> CommGroup:
    """Return a group of `size` ranks, every `stride`-th: data- or context-parallel ranks, with the
    tensor-parallel size as the stride."""
    return CommGroup(cluster, size, min(size, max(1, cluster.gpus_per_node // stride)))


def transfer_seconds(cluster: Cluster, size: float, distance: int, pp: int) -> float:
    """Return the seconds in which each of `pp` pipeline ranks, `distance` ranks apart, sends `size`
    bytes to the next one; the last one sends to the first one."""
    card = cluster.card
    if pp * distance <= cluster.gpus_per_node:
        return COLLECTIVE_SECONDS + size / (card.nvlink * NVLINK_SHARE)
    return COLLECTIVE_SECONDS + cluster.latency + size / (card.nic * NIC_SHARE)
