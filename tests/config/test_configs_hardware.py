"""Hardware profiles: the memory in each comment is the planned one, and fits with a margin."""

import re
from pathlib import Path

import pytest

from megagrow.common.gpu_specs import find_gpu
from megagrow.config.includes import load_model
from megagrow.config.load import load_run
from megagrow.planning.memory import stage_memory
from megagrow.planning.memory_fit import on_gpu
from megagrow.planning.planner import plan_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PROFILES = sorted(path.stem for path in (CONFIGS / "hardware").glob("*.yaml"))
WORLDS = {"1x": 1, "8x": 8, "8x8x": 64, "64x8x": 512}
MARGIN = 0.85
"""Share of the GPU memory that a profile may use."""


def card_and_world(profile: str) -> tuple[str, int]:
    """Return the GPU and the number of ranks in a profile's name."""
    match = re.fullmatch(r"((?:\d+x)+)([a-z]+\d+)-[\d.]+b", profile)
    assert match is not None
    return match[2], WORLDS[match[1]]


def memory_of(card: str) -> int:
    """Return the memory of a GPU in bytes."""
    memory = find_gpu(card).memory
    assert memory is not None
    return memory


def claims(profile: str) -> dict[str, float]:
    """Return the models in a profile's comment with their planned GiB."""
    text = (CONFIGS / "hardware" / f"{profile}.yaml").read_text(encoding="utf-8")
    comment = " ".join(line.removeprefix("# ") for line in text.splitlines() if line[0] == "#")
    found = re.search(r"Planned per GPU, of ([\d.]+) GiB: (.*?)\. ", comment)
    assert found is not None
    card, _ = card_and_world(profile)
    assert float(found[1]) == round(memory_of(card) / 2**30, 1)
    return {name: float(size) for name, size in (item.split() for item in found[2].split(", "))}


PAIRS = [(profile, model) for profile in PROFILES for model in claims(profile)]
SIZES = [
    (profile, model.removeprefix("llama-"))
    for profile, model in PAIRS
    if model in ("llama-410m", "llama-1.1b", "llama-3b", "llama-7b")
]


@pytest.mark.parametrize(("profile", "model"), PAIRS)
def test_a_claimed_model_fits_and_takes_what_the_comment_says(profile: str, model: str) -> None:
    card, world = card_and_world(profile)
    length = load_model(model).max_position_embeddings
    overrides = [
        f"model={model}",
        f"data.sequence_length={length}",
        f"batch.global_batch_size={2**21 // length}",
        f"hardware={profile}",
    ]
    run = load_run(CONFIGS / "scratch-7b.yaml", overrides)
    (stage,) = plan_run(run, world, memory_of(card)).stages
    assert on_gpu(stage.memory) <= MARGIN * memory_of(card)
    assert on_gpu(stage.memory) / 2**30 == pytest.approx(claims(profile)[model], rel=0.03)


@pytest.mark.parametrize(("profile", "size"), SIZES)
def test_the_papers_runs_fit_with_it_growth_included(profile: str, size: str) -> None:
    card, world = card_and_world(profile)
    path = CONFIGS / f"gstack-{size}.yaml"
    run, plain = load_run(path, [f"hardware={profile}"]), load_run(path)
    plan = plan_run(run, world, int(MARGIN * memory_of(card)))
    assert [warning for warning in plan.warnings if "does not fit" in warning] == []
    for stage, before in zip(run.stages, plain.stages, strict=True):
        assert stage.batch.global_batch_size == before.batch.global_batch_size
        free = {"batch": before.batch, "parallel": before.parallel}
        assert stage.model_copy(update=free) == before


def test_every_paper_size_has_a_profile_on_every_machine_that_holds_it() -> None:
    there = {(*card_and_world(profile), size) for profile, size in SIZES}
    for card in ("h100", "h200"):
        for world in WORLDS.values():
            sizes = {size for c, w, size in there if (c, w) == (card, world)}
            assert sizes == {"410m", "1.1b", "3b", "7b"} - ({"7b"} if world == 1 else set())


def test_7b_does_not_fit_one_card_with_the_margin() -> None:
    stage = load_run(CONFIGS / "scratch-7b.yaml").stages[0]
    assert on_gpu(stage_memory(stage, 1, 2048, bf16=True)) > MARGIN * memory_of("h200")


def test_an_a100_takes_the_profiles_of_an_h100() -> None:
    assert memory_of("a100") == memory_of("h100")
