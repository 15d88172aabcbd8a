"""Hardware profiles: the memory in each comment is the planned one, and fits with a margin."""

import re

import pytest

from megagrow.config.load import load_run
from megagrow.planning.memory import stage_memory
from megagrow.planning.memory_fit import on_gpu
from megagrow.planning.planner import plan_run
from tools.docs.hardware_profiles import CONFIGS, Profile, gpu_memory, hardware_profiles

WORLDS = (1, 8, 64, 512)
MARGIN = 0.85
"""Share of the GPU memory that a profile may use."""


def claims(profile: Profile) -> dict[str, float]:
    """Return the models in a profile's comment with their planned GiB."""
    lines = [line.removeprefix("# ") for line in profile.text.splitlines() if line[0] == "#"]
    found = re.search(r"Planned per GPU, of ([\d.]+) GiB: (.*?)\. ", " ".join(lines))
    assert found is not None
    assert float(found[1]) == round(profile.gpu_memory / 2**30, 1)
    return {name: float(size) for name, size in (item.split() for item in found[2].split(", "))}


PAIRS = [(profile, model) for profile in hardware_profiles() for model in claims(profile)]
SIZES = [
    (profile, model.removeprefix("llama-"))
    for profile, model in PAIRS
    if model in ("llama-410m", "llama-1.1b", "llama-3b", "llama-7b")
]


@pytest.mark.parametrize(("profile", "model"), PAIRS, ids=str)
def test_a_claimed_model_fits_and_takes_what_the_comment_says(profile: Profile, model: str) -> None:
    (stage,) = plan_run(profile.run(model), profile.world_size, profile.gpu_memory).stages
    assert on_gpu(stage.memory) <= MARGIN * profile.gpu_memory
    assert on_gpu(stage.memory) / 2**30 == pytest.approx(claims(profile)[model], rel=0.03)


@pytest.mark.parametrize(("profile", "size"), SIZES, ids=str)
def test_the_papers_runs_fit_with_it_growth_included(profile: Profile, size: str) -> None:
    path = CONFIGS / f"gstack-{size}.yaml"
    run, plain = load_run(path, [f"hardware={profile.name}"]), load_run(path)
    plan = plan_run(run, profile.world_size, int(MARGIN * profile.gpu_memory))
    assert [warning for warning in plan.warnings if "does not fit" in warning] == []
    for stage, before in zip(run.stages, plain.stages, strict=True):
        assert stage.batch.global_batch_size == before.batch.global_batch_size
        free = {"batch": before.batch, "parallel": before.parallel}
        assert stage.model_copy(update=free) == before


def test_every_paper_size_has_a_profile_on_every_machine_that_holds_it() -> None:
    there = {(profile.card, profile.world_size, size) for profile, size in SIZES}
    for card in ("h100", "h200"):
        for world in WORLDS:
            sizes = {size for c, w, size in there if (c, w) == (card, world)}
            assert sizes == {"410m", "1.1b", "3b", "7b"} - ({"7b"} if world == 1 else set())


def test_7b_does_not_fit_one_card_with_the_margin() -> None:
    stage = load_run(CONFIGS / "scratch-7b.yaml").stages[0]
    assert on_gpu(stage_memory(stage, 1, bf16=True)) > MARGIN * gpu_memory("h200")


def test_an_a100_takes_the_profiles_of_an_h100() -> None:
    assert gpu_memory("a100") == gpu_memory("h100")
