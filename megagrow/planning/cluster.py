"""Clusters described by datasheet figures: GPUs, links within a node, network between nodes."""

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from megagrow.common.gpu_specs import Gpu, find_gpu
from megagrow.common.yaml_file import read_mapping
from megagrow.config.sections import Count, Section
from megagrow.errors import ConfigError

MOST_GPUS = 4096
"""Maximum number of GPUs for which the step model is intended."""


@dataclass(frozen=True)
class Card:
    """Datasheet figures, in addition to FLOP/s, that determine the time of a step."""

    family: str
    """Key of the measured efficiencies in `step.rates`."""
    processors: int
    """Streaming multiprocessors."""
    hbm: float
    """Memory bandwidth in bytes per second."""
    nvlink: float
    """Bytes per second to the other cards of the node, in one direction."""
    nic: float
    """Typical bytes per second and card to other nodes, in one direction."""
    nvswitch: bool = True
    """True if any pair of cards has the full `nvlink` bandwidth; else each pair has a share."""


CARDS = {
    "A100": Card("ampere", 108, 2.039e12, 300e9, 25e9),
    "A800": Card("ampere", 108, 2.039e12, 200e9, 25e9),
    "H100": Card("hopper", 132, 3.35e12, 450e9, 50e9),
    "H800": Card("hopper", 132, 3.35e12, 200e9, 50e9),
    "H200": Card("hopper", 132, 4.8e12, 450e9, 50e9),
}
"""SXM cards, NVIDIA's datasheets; networks as in DGX: 8 x 200 Gb/s with A100, 8 x 400 with H100."""

POWER_EXPONENT = 0.5
"""Exponent of speed as a function of power for a power-limited card. Power is proportional to
the clock times the square of the voltage, and the voltage falls with the clock within limits."""

LATENCY = 5e-6
"""Seconds per hop of a collective through the network (InfiniBand)."""


@dataclass(frozen=True)
class Cluster:
    """Identical nodes with identical cards."""

    gpu: Gpu
    card: Card
    gpus_per_node: int
    nodes: int
    latency: float = LATENCY
    power_share: float = 1.0
    """FLOP/s relative to full TDP: 1, or less if the power is limited."""

    @property
    def gpus(self) -> int:
        """Total number of GPUs."""
        return self.gpus_per_node * self.nodes


class ClusterFile(Section):
    """Cluster definition in a YAML file; omitted figures are those of `CARDS`."""

    gpu: str
    gpus_per_node: Count = 8
    nodes: Count = 1
    nvlink_gb_per_second: float | None = Field(default=None, gt=0)
    """NVLink bandwidth of one card in one direction."""
    network_gb_per_second: float | None = Field(default=None, gt=0)
    """Network bandwidth of one card in one direction: 50 for 400 Gb/s."""
    memory_gb_per_second: float | None = Field(default=None, gt=0)
    """Memory bandwidth of one card."""
    nvswitch: bool = True
    """False for nodes of four H100 or H200, where each pair of cards has a third of the links."""
    watts: float | None = Field(default=None, gt=0)
    """Power limit of a card."""
    latency_us: float | None = Field(default=None, gt=0)
    """Latency of one network hop."""


def find_cluster(text: str) -> Cluster:
    """Return the cluster of `GPU:GPUS_PER_NODExNODES`, such as `h100:8x64`, or of a YAML file.

    Raises ConfigError for other text, unknown cards and more than `MOST_GPUS` GPUs.
    """
    if Path(text).suffix in (".yaml", ".yml"):
        return _from_file(Path(text))
    match = re.fullmatch(r"([A-Za-z][\w -]*):(\d{1,6})x(\d{1,6})", text)
    if match is None:
        raise ConfigError(
            f"--cluster {text}: use GPU:GPUS_PER_NODExNODES, such as h100:8x64, or a YAML file"
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
    """Return the cluster of these figures; errors refer to it as `text`, as in `find_cluster`."""
    gpu = find_gpu(given.gpu, "--cluster")
    if gpu.name not in CARDS:
        names = ", ".join(name.lower() for name in CARDS)
        raise ConfigError(
            f"--cluster {text}: no bandwidth figures for {gpu.name.lower()}; available are {names}"
        )
    if given.gpus_per_node * given.nodes > MOST_GPUS:
        raise ConfigError(
            f"--cluster {text}: {given.gpus_per_node * given.nodes:,} GPUs; the step model is "
            f"intended for at most {MOST_GPUS:,}"
        )
    default = CARDS[gpu.name]
    card = Card(
        default.family,
        default.processors,
        _bytes(given.memory_gb_per_second, default.hbm),
        _bytes(given.nvlink_gb_per_second, default.nvlink),
        _bytes(given.network_gb_per_second, default.nic),
        given.nvswitch,
    )
    latency = LATENCY if given.latency_us is None else given.latency_us * 1e-6
    share = 1.0
    if given.watts is not None and gpu.watts is not None:
        share = min(1.0, (given.watts / gpu.watts) ** POWER_EXPONENT)
    return Cluster(gpu, card, given.gpus_per_node, given.nodes, latency, share)


def _bytes(gigabytes: float | None, default: float) -> float:
    return default if gigabytes is None else gigabytes * 1e9
