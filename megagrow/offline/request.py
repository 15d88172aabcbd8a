"""Request of an offline growth or conversion, as given by the user."""

from dataclasses import dataclass
from pathlib import Path

from megagrow.common.sizes import parse_bytes
from megagrow.errors import ConfigError
from megagrow.formats.hugging_face_config import DTYPE_NAMES


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of the command. None means the value of the source or of the run's stage."""

    source: Path
    """Source: checkpoint, run directory, or Hugging Face folder."""
    out: Path
    to: str | None = None
    """Target: model file or name, or run file. None is the source's own model."""
    stage: int | None = None
    """Stage of the run file that starts with this growth."""
    operators: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    """Overrides of the form `growth.KEY=VALUE`."""
    seed: int | None = None
    form: str | None = None
    """Output format: `checkpoint` or `huggingface`."""
    zero_stage: int | None = None
    dp: int | None = None
    tp: int | None = None
    weight_decay_on: str | None = None
    """Weight decay on `all` or `matrices`."""
    dtype: str = "float32"
    """Dtype of a Hugging Face folder's weights."""
    shard_size: str = "5GB"
    """Maximum size of a Hugging Face folder's files."""
    memory: str = "1GiB"
    """Memory budget in addition to the program itself."""
    text: Path | None = None
    """Text on which the loss is reported."""
    tokenizer: str | None = None
    """Tokenizer of `text`, and of a written Hugging Face folder."""

    def check(self) -> None:
        """Raise ConfigError, naming the option, for invalid values."""
        _bytes("--memory", self.memory)
        _bytes("--shard-size", self.shard_size)
        for option, value, allowed in (
            ("--format", self.form, ("checkpoint", "huggingface")),
            ("--weight-decay-on", self.weight_decay_on, ("all", "matrices")),
            ("--dtype", self.dtype, tuple(DTYPE_NAMES.values())),
        ):
            if value is not None and value not in allowed:
                raise ConfigError(f"{option} {value}: should be one of {', '.join(allowed)}")

    @property
    def memory_bytes(self) -> int:
        return _bytes("--memory", self.memory)

    @property
    def shard_bytes(self) -> int:
        return _bytes("--shard-size", self.shard_size)

    @property
    def stored_dtype(self) -> str:
        """Name of the dtype in safetensors' format."""
        return next(short for short, name in DTYPE_NAMES.items() if name == self.dtype)


def _bytes(option: str, written: str) -> int:
    try:
        return parse_bytes(written)
    except ValueError as error:
        raise ConfigError(f"{option} {written}: {error}") from error
