"""Model files: a model by itself, by the path or the name of its file."""

from pathlib import Path

from pydantic import ValidationError

from megagrow.common.yaml_file import read_mapping
from megagrow.config.includes import expand, search_path
from megagrow.config.overrides import refuse_unknown_part_keys
from megagrow.config.schema import ModelConfig
from megagrow.config.validation import model_problems
from megagrow.errors import ConfigError

_OF_RUNS = {"name", "stages", "data", "output_dir"}
"""Keys that only a run file has, not a model file."""


def is_run_file(name: str) -> bool:
    """Return True if `name` is the path of a run file, not of a model file or a model's name."""
    path = Path(name)
    return path.is_file() and bool(_OF_RUNS & read_mapping(path).keys())


def load_model(name: str) -> ModelConfig:
    """Return the model in the file at the path `name`, else the model of that name in the search
    path of the current directory.

    Raises:
        ConfigError: the model is missing or invalid; the message is one line.
    """
    path = Path(name)
    folders = search_path(path if path.is_file() else Path("run.yaml"))
    if path.is_file():
        tree = read_mapping(path)
        refuse_unknown_part_keys(tree, "model", name)
        tree = expand({"model": tree}, folders, name)["model"]
    elif path.suffix == ".yaml":
        raise ConfigError(f"{name}: no such file")
    else:
        tree = expand({"model": name}, folders, f"model {name}")["model"]
    return checked_model(tree, name)


def checked_model(values: dict[str, object], origin: str) -> ModelConfig:
    """Return the model with these values; raise ConfigError, naming `origin`, if invalid."""
    try:
        model = ModelConfig.model_validate(values)
    except ValidationError as error:
        texts = [
            f"'{'.'.join(map(str, detail['loc']))}': {detail['msg']}"
            for detail in error.errors()
            if detail["type"] != "default_factory_not_called"  # caused by another key's error
        ]
        raise ConfigError(f"{origin}: {'; '.join(texts)}") from error
    if texts := list(model_problems(model, "model")):
        raise ConfigError(f"{origin}: {'; '.join(texts)}")
    return model
