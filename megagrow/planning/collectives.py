"""How long a collective takes, by the bytes that have to pass and the links that they pass."""

from dataclasses import dataclass

from megagrow.planning.cluster import Cluster
from megagrow.planning.step_rates import COLLECTIVE_SECONDS, NIC_SHARE, NVLINK_SHARE


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: `size` of them, `local` of which share a node."""

    cluster: Cluster
    size: int
    local: int

    @property
    def nodes(self) -> int:
        return self.size // self.local

    def one_way(self, whole: float) -> float:
        """Seconds of an all-gather to `whole` bytes on each rank, or of a reduce-scatter of them.

        All bytes but a rank's own come in over NVLink. A node has to get what lies on other nodes,
        once, over the network cards of its ranks of this group. Both go on at the same time, so the
        slower link decides.
        """
        if self.size == 1:
            return 0.0
        card = self.cluster.card
        links = 1.0 if card.nvswitch else (self.local - 1) / max(1, self.cluster.gpus_per_node - 1)
        inner = whole * (self.size - 1) / self.size
        outer = whole * (self.nodes - 1) / self.nodes / (self.local * card.nic * NIC_SHARE)
        seconds = COLLECTIVE_SECONDS + self.cluster.latency * (self.nodes - 1)
        if self.local > 1:
            outer = max(outer, inner / (card.nvlink * NVLINK_SHARE * links))
        return seconds + outer

    def all_reduce(self, whole: float) -> float:
        """Seconds until each rank has the sum of `whole` bytes: scattered, then gathered."""
        return 2 * self.one_way(whole)


def tensor_group(cluster: Cluster, tp: int) -> Group:
    """Tensor-parallel ranks: neighbours, in one node as far as they fit."""
    return Group(cluster, tp, min(tp, cluster.gpus_per_node))


def data_group(cluster: Cluster, dp: int, tp: int) -> Group:
    """Data-parallel ranks: every tp-th one."""
    return Group(cluster, dp, min(dp, max(1, cluster.gpus_per_node // tp)))
