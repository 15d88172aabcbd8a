"""What the user of `megagrow grow` asks for, as it was written."""

from dataclasses import dataclass
from pathlib import Path

from megagrow.common.sizes import parse_bytes
from megagrow.errors import ConfigError
from megagrow.formats.hugging_face_config import DTYPE_NAMES


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asks for. None stands for what the source, or the run's stage, has."""

    source: Path
    """A checkpoint, a run directory, or a Hugging Face folder."""
    out: Path
    to: str | None = None
    """The target: a model file or its name, or a run file. None is the source's own model."""
    stage: int | None = None
    """Of the run file: the stage that begins with this growth."""
    operators: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    """`growth.KEY=VALUE`."""
    seed: int | None = None
    form: str | None = None
    """`checkpoint` or `huggingface`."""
    zero_stage: int | None = None
    dp: int | None = None
    tp: int | None = None
    weight_decay_on: str | None = None
    """`all` or `matrices`."""
    dtype: str = "float32"
    """Of a Hugging Face folder's weights."""
    shard_size: str = "5GB"
    """Of a Hugging Face folder's files, at most."""
    memory: str = "1GiB"
    """What the work may take beyond the program itself."""
    text: Path | None = None
    tokenizer: str | None = None

    def check(self) -> None:
        """InputError, naming the option, if one has a value that it can not have."""
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
        """The type's name in safetensors' format."""
        return next(short for short, name in DTYPE_NAMES.items() if name == self.dtype)


def _bytes(option: str, written: str) -> int:
    try:
        return parse_bytes(written)
    except ValueError as error:
        raise ConfigError(f"{option} {written}: {error}") from error
