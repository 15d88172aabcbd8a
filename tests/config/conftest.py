"""Fixtures that load variants of a small valid run file, with one or two stages."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megagrow.config.load import load_run
from megagrow.config.schema import RunConfig
from megagrow.errors import InputError

ONE_STAGE = """
name: tiny
output_dir: out
data: {train: [{path: corpus}], sequence_length: 32}
model:
  num_hidden_layers: 2
  hidden_size: 16
  num_attention_heads: 4
  intermediate_size: 24
  vocab_size: 64
tokens: 10K
batch: {global_batch_size: 8, micro_batch_size: 2}
optimizer: {lr: 1e-3}
"""

SECOND_STAGE = """
stages:
  - tokens: 5K
  - tokens: 20K
    model:
      num_hidden_layers: 8
      hidden_size: 16
      num_attention_heads: 4
      intermediate_size: 24
      vocab_size: 64
    growth: {}
"""

Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write a text to run.yaml and load it with overrides."""

    def load_text(*overrides: str, text: str = ONE_STAGE) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_run(path, overrides)

    return load_text


@pytest.fixture
def load_two(load: Load) -> Load:
    """Load a run of two stages, the second grown from the first."""

    def load_text(*overrides: str, text: str = ONE_STAGE + SECOND_STAGE) -> RunConfig:
        return load(*overrides, text=text)

    return load_text


@pytest.fixture
def write_part(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write the file of a named section below the run file's folder."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def refusal(load: Load, tmp_path: Path) -> Callable[..., str]:
    """Return the one-line error of an invalid run file, without the folder's name."""

    def message(overrides: Sequence[str] = (), text: str = ONE_STAGE) -> str:
        with pytest.raises(InputError) as caught:
            load(*overrides, text=text)
        error = str(caught.value)
        assert "\n" not in error
        return error.replace(f"{tmp_path}/", "")

    return message
