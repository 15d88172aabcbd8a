"""Section `kernels`: defaults of all stages, merged key by key, with validated values."""

from megagrow.config.stage import KernelsConfig


def test_the_top_is_the_default_of_every_stage(load_two) -> None:
    first, second = load_two("kernels.attention=triton", "stages.1.kernels.norm=torch").stages
    assert first.kernels == KernelsConfig(attention="triton")
    assert second.kernels == KernelsConfig(attention="triton", norm="torch")


def test_everything_is_auto_unless_it_is_said(load) -> None:
    chosen = load().stages[0].kernels.model_dump()
    assert chosen.pop("linear_cross_entropy") is False
    assert set(chosen.values()) == {"auto"}


def test_unknown_backends_and_keys_are_named(refusal) -> None:
    message = refusal(["kernels.attention=flash"])
    assert "'kernels.attention' = 'flash'" in message and "'flash_attn'" in message
    assert "unknown key 'kernels.rmsnorm'" in refusal(["kernels.rmsnorm=triton"])
