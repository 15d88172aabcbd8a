"""One model by itself: a file of configs/model/, by its path or by its name."""

from pathlib import Path

from pydantic import ValidationError

from megagrow.common.yaml_file import read_mapping
from megagrow.config.includes import expand, search_path
from megagrow.config.keys import refuse_unknown_part_keys
from megagrow.config.schema import ModelConfig
from megagrow.config.validation import model_problems
from megagrow.errors import InputError

_OF_RUNS = {"name", "stages", "data", "output_dir"}
"""Keys that only the file of a run has."""


def is_run_file(name: str) -> bool:
    """Whether `name` is the path of a run file, and not that of a model file or a model's name."""
    path = Path(name)
    return path.is_file() and bool(_OF_RUNS & read_mapping(path).keys())


def load_model(name: str) -> ModelConfig:
    """The model in the file at the path `name`, else the one of that name, searched for as run
    files in the current directory would. InputError, in one line, for everything wrong with it."""
    path = Path(name)
    folders = search_path(path if path.is_file() else Path("run.yaml"))
    if path.is_file():
        tree = read_mapping(path)
        refuse_unknown_part_keys(tree, "model", name)
        tree = expand({"model": tree}, folders, name)["model"]
    elif path.suffix == ".yaml":
        raise InputError(f"{name}: no such file")
    else:
        tree = expand({"model": name}, folders, f"model {name}")["model"]
    return checked_model(tree, name)


def checked_model(values: dict[str, object], origin: str) -> ModelConfig:
    """A model of these values. InputError, naming `origin`, if they make none."""
    try:
        model = ModelConfig.model_validate(values)
    except ValidationError as error:
        wrong = [
            f"'{'.'.join(map(str, found['loc']))}': {found['msg']}"
            for found in error.errors()
            if found["type"] != "default_factory_not_called"  # it hangs on another key's error
        ]
        raise InputError(f"{origin}: {'; '.join(wrong)}") from error
    if found := list(model_problems(model, "model")):
        raise InputError(f"{origin}: {'; '.join(found)}")
    return model
