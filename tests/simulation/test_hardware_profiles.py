"""Hardware profiles: names that match the contents, and planned memory that matches simulations.

`tools/docs/simulated_memory.py --check` simulates all profiles.
"""

import re

import pytest

from megagrow.planning.simulated import simulate_run
from megagrow.simulation.rank import Actions
from tools.docs.hardware_profiles import SIZES, Profile, hardware_profiles, read_profile

PROFILES = hardware_profiles()
CARDS = {"h100": r"H100 \(or A100 of 80 GB\)", "h200": "H200"}

SIMULATED = ("1xh100-410m", "8xh200-1.1b", "64x8xh100-13b")
"""Without checkpointing on one rank and on several, and with tensor parallelism."""


def test_profiles_are_found_by_name() -> None:
    assert {profile.size for profile in PROFILES} == set(SIZES)
    assert read_profile("64x8xh200-13b") == Profile("64x8xh200-13b", 512, "h200", "13b")
    with pytest.raises(ValueError, match="8xh100-8b is not NODESxGPUSxCARD-SIZE"):
        read_profile("8xh100-8b")


@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_name_comment_and_contents_of_a_profile_agree(profile: Profile) -> None:
    (stage,) = profile.run(profile.model).stages
    parallel, machine = stage.parallel, profile.name.split(f"x{profile.card}")[0]
    layout = rf"ZeRO {parallel.zero_stage}, TP {parallel.tensor_model_parallel_size}, micro-batch "
    title = f"# {machine.replace('x', ' x ')} {CARDS[profile.card]}: {layout}"
    assert re.match(f"{title}{stage.batch.micro_batch_size}[.,]", profile.text)
    assert profile.model in profile.text
    assert stage.parallel.sequence_parallel == (parallel.tensor_model_parallel_size > 1)
    per_pass = stage.batch.micro_batch_size * profile.world_size
    per_pass //= parallel.tensor_model_parallel_size
    assert stage.batch.global_batch_size % per_pass == 0


@pytest.mark.parametrize("name", SIMULATED)
def test_planned_memory_is_that_of_a_simulated_step(name: str) -> None:
    profile = read_profile(name)
    run = profile.run(profile.model)
    (stage,) = simulate_run(run, profile.world_size, actions=Actions(micro_batches=1))
    peak = stage.training
    assert peak.agrees, f"planned {peak.planned:,}, simulated {peak.simulated:,}"
