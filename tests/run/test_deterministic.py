"""`deterministic_mode`: the settings of a run and their end, conflicts, and equal bits on a CPU."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import megagrow.train.loop
from megagrow.errors import ConfigError
from megagrow.train.determinism import VARIABLES, deterministic_algorithms
from megagrow.train.kernel_calls import NO_CHECKS
from megagrow.train.kernel_selection import _check_stages, determinism_problems
from tests.helpers.jobs import Hook, records, train, write_run
from tests.helpers.runs import STEP_TOKENS, make_run

NAMES = tuple(VARIABLES)
GPU = torch.device("cuda", 0)


def settings() -> tuple[Any, ...]:
    """All process settings that the mode changes."""
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    flags = cudnn.deterministic, cudnn.benchmark, memory.fill_uninitialized_memory
    return torch.are_deterministic_algorithms_enabled(), *flags


def test_settings_hold_within_the_context_and_end_with_it(monkeypatch) -> None:

    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    before = settings()
    with deterministic_algorithms(False):
        assert settings() == before and not any(name in os.environ for name in NAMES)
    with pytest.raises(ValueError, match="of the run"), deterministic_algorithms(True):
        assert settings() == (True, True, False, False)
        assert [os.environ[name] for name in NAMES] == [":4096:8", "0"]
        raise ValueError("of the run")
    assert settings() == before and not any(name in os.environ for name in NAMES)


@pytest.mark.parametrize(("name", "value"), zip(NAMES, ("", "1"), strict=True))
def test_a_conflicting_variable_is_refused_on_gpus_and_kept(monkeypatch, tmp_path, name, value):
    monkeypatch.setenv(name, value)
    plain = make_run(tmp_path, [{"tokens": STEP_TOKENS}])
    run = plain.model_copy(update={"deterministic_mode": True})
    with deterministic_algorithms(True):
        assert determinism_problems(plain, GPU) == []
        assert determinism_problems(run, torch.device("cpu")) == []
        with pytest.raises(ConfigError, match=f"^deterministic_mode: {name} = {value}; unset it"):
            _check_stages(run, GPU, NO_CHECKS)


def expecting(deterministic: bool) -> Hook:
    """A step fails if the mode of torch is another one."""

    def hook(rank: int, patch: pytest.MonkeyPatch) -> None:
        train_step = megagrow.train.loop.train_step

        def checked(*arguments: Any) -> Any:
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            return train_step(*arguments)

        patch.setattr(megagrow.train.loop, "train_step", checked)

    return hook


@pytest.mark.dist
def test_a_run_on_cpus_has_the_same_bits_with_and_without(tmp_path: Path) -> None:
    losses = []
    for mode in (False, True):
        folder = tmp_path / str(mode)
        folder.mkdir()
        run = make_run(folder, [{"tokens": 3 * STEP_TOKENS}], deterministic_mode=mode)
        done = train(write_run(folder / "run.yaml", run), 2, expecting(mode)).finish()
        assert done.codes == [0, 0], done.err
        losses.append(records(run, "train", ["loss", "grad_norm"]))
    assert losses[0] == losses[1] and len(losses[0]) == 3
