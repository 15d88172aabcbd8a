"""Hardware profiles of configs/hardware/: their machine, model and run."""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megagrow.common.gpu_specs import find_gpu
from megagrow.config.load import load_run
from megagrow.config.model_file import load_model
from megagrow.config.schema import RunConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

SIZES = {
    "410m": "llama-410m",
    "1.1b": "llama-1.1b",
    "3b": "llama-3b",
    "7b": "llama-7b",
    "13b": "llama-2-13b",
    "70b": "llama-2-70b",
}
"""Largest model of a profile by the size in the profile's name, smallest first."""

STEP_TOKENS = 2**21
"""Tokens per step for which the profiles were selected."""

_NAME = re.compile(r"((?:\d+x)+)([a-z]+\d+)-([\d.]+[bm])")


@dataclass(frozen=True)
class Profile:
    """Profile for `world_size` GPUs and models up to a size."""

    name: str
    world_size: int
    card: str
    size: str

    @property
    def model(self) -> str:
        """Name of the largest model, in configs/model/."""
        return SIZES[self.size]

    @property
    def gpu_memory(self) -> int:
        """Memory of a GPU in bytes."""
        return gpu_memory(self.card)

    @property
    def text(self) -> str:
        """Text of the file."""
        return (CONFIGS / "hardware" / f"{self.name}.yaml").read_text(encoding="utf-8")

    def __str__(self) -> str:
        return self.name

    def run(self, model: str) -> RunConfig:
        """Return a run of one stage with this profile, in sequences of the model's maximum."""
        length = load_model(model).max_position_embeddings
        overrides = (
            *(f"model={model}", f"hardware={self.name}", f"data.sequence_length={length}"),
            f"batch.global_batch_size={STEP_TOKENS // length}",
        )
        return load_run(CONFIGS / "scratch-7b.yaml", overrides)


def gpu_memory(card: str) -> int:
    """Return the memory of a GPU in bytes."""
    memory = find_gpu(card).memory
    if memory is None:
        raise ValueError(f"the memory of {card} is not known")
    return memory


def read_profile(name: str) -> Profile:
    """Return the profile of a name such as `8x8xh100-7b`: NODES x GPUs x card - size."""
    match = _NAME.fullmatch(name)
    if match is None or match[3] not in SIZES:
        raise ValueError(f"{name} is not NODESxGPUSxCARD-SIZE with a size of {', '.join(SIZES)}")
    ranks = prod(int(count) for count in match[1].split("x") if count)
    return Profile(name, ranks, match[2], match[3])


def hardware_profiles() -> list[Profile]:
    """Return all profiles, by size of the model, number of GPUs and card."""
    names = (path.stem for path in (CONFIGS / "hardware").glob("*.yaml"))
    order = list(SIZES)
    return sorted(
        map(read_profile, names),
        key=lambda each: (order.index(each.size), each.world_size, each.card),
    )
