"""A cluster by the figures of its datasheets: cards, links within a node, network between them."""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from megagrow.common.gpu_specs import Gpu, find_gpu
from megagrow.common.yaml_file import read_mapping
from megagrow.config.sections import Count, Section
from megagrow.errors import ConfigError

MOST_GPUS = 1024
"""To which the model of a step is meant to hold."""


@dataclass(frozen=True)
class Card:
    """What a step's time follows from, besides the FLOP/s."""

    family: str
    """Which of the measured shares hold for it (`step_rates`)."""
    processors: int
    """Streaming multiprocessors."""
    hbm: float
    """Bytes per second of its memory."""
    nvlink: float
    """Bytes per second to the other cards of its node, in one direction."""
    nic: float
    """Bytes per second to other nodes, in one direction, that are usual for each card."""
    nvswitch: bool = True
    """Whether all of `nvlink` reaches any card of the node; without, each pair has its share."""


CARDS = {
    "A100": Card("ampere", 108, 2.039e12, 300e9, 25e9),
    "A800": Card("ampere", 108, 2.039e12, 200e9, 25e9),
    "H100": Card("hopper", 132, 3.35e12, 450e9, 50e9),
    "H800": Card("hopper", 132, 3.35e12, 200e9, 50e9),
    "H200": Card("hopper", 132, 4.8e12, 450e9, 50e9),
}
"""SXM cards, NVIDIA's datasheets; networks as in DGX: 8 x 200 Gb/s with A100, 8 x 400 with H100."""

POWER_EXPONENT = 0.5
"""Speed over power where power is what limits a card: power goes with the clock times the square of
the voltage, and the voltage falls with the clock as far as it can."""

LATENCY = 5e-6
"""Seconds from card to card through the network, for one hop of a collective (InfiniBand)."""


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal cards."""

    gpu: Gpu
    card: Card
    gpus_per_node: int
    nodes: int
    latency: float = LATENCY
    power_share: float = 1.0
    """Of the FLOP/s that power allows at its TDP: 1, or less where it is limited."""

    @property
    def gpus(self) -> int:
        """The ranks of a run that has all of it."""
        return self.gpus_per_node * self.nodes


class ClusterFile(Section):
    """A cluster as a YAML file gives it; what is left out is as in `CARDS`."""

    gpu: str
    gpus_per_node: Count = 8
    nodes: Count = 1
    nvlink_gb_per_second: float | None = Field(default=None, gt=0)
    """Of one card, in one direction."""
    network_gb_per_second: float | None = Field(default=None, gt=0)
    """Of one card, in one direction: 50 for 400 Gb/s each."""
    memory_gb_per_second: float | None = Field(default=None, gt=0)
    """Of the card's own memory."""
    nvswitch: bool = True
    """Nodes of four H100 or H200 have none: each pair of cards has a third of the links."""
    watts: float | None = Field(default=None, gt=0)
    """To which the power of a card is limited."""
    latency_us: float | None = Field(default=None, gt=0)
    """Of one hop through the network."""


def find_cluster(text: str) -> Cluster:
    """A cluster from `GPU:GPUS_PER_NODExNODES`, such as `h100:8x64`, or from a YAML file.

    InputError for what is neither, for cards without figures here, and for more than `MOST_GPUS`.
    """
    if Path(text).suffix in (".yaml", ".yml"):
        return _from_file(Path(text))
    match = re.fullmatch(r"([A-Za-z][\w -]*):(\d{1,6})x(\d{1,6})", text)
    if match is None:
        raise ConfigError(
            f"--cluster {text}: give GPU:GPUS_PER_NODExNODES, such as h100:8x64, or a YAML file"
        )
    sizes = int(match[2]), int(match[3])
    if not all(sizes):
        raise ConfigError(f"--cluster {text}: a cluster has at least one node with one GPU")
    return make_cluster(text, ClusterFile(gpu=match[1], gpus_per_node=sizes[0], nodes=sizes[1]))


def _from_file(path: Path) -> Cluster:
    try:
        given = ClusterFile.model_validate(read_mapping(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {place}: {first['msg']}") from error
    return make_cluster(str(path), given)


def make_cluster(text: str, given: ClusterFile) -> Cluster:
    """The cluster of these figures; `text` is what errors call it. InputError as `find_cluster`."""
    gpu = find_gpu(given.gpu, "--cluster")
    if gpu.name not in CARDS:
        names = ", ".join(name.lower() for name in CARDS)
        raise ConfigError(
            f"--cluster {text}: no figures of a {gpu.name.lower()} beyond its FLOP/s; there are "
            f"for {names}"
        )
    if given.gpus_per_node * given.nodes > MOST_GPUS:
        raise ConfigError(
            f"--cluster {text}: {given.gpus_per_node * given.nodes:,} GPUs; the model of a step is "
            f"meant for at most {MOST_GPUS:,}"
        )
    usual = CARDS[gpu.name]
    card = Card(
        usual.family,
        usual.processors,
        _bytes(given.memory_gb_per_second, usual.hbm),
        _bytes(given.nvlink_gb_per_second, usual.nvlink),
        _bytes(given.network_gb_per_second, usual.nic),
        given.nvswitch,
    )
    latency = LATENCY if given.latency_us is None else given.latency_us * 1e-6
    share = 1.0
    if given.watts is not None and gpu.watts is not None:
        share = min(1.0, (given.watts / gpu.watts) ** POWER_EXPONENT)
    return Cluster(gpu, card, given.gpus_per_node, given.nodes, latency, share)


def _bytes(gigabytes: float | None, usual: float) -> float:
    return usual if gigabytes is None else gigabytes * 1e9
