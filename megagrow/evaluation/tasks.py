"""lm-eval tasks by name, with documents from the hub or, for the `gstack` tasks, from local files.

Prompts, choices and metrics are lm-eval's in both cases; only the source of the documents differs.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.tasks import TaskManager

from megagrow.errors import ConfigError, DataError
from megagrow.evaluation.local_data import Doc, read_documents

GROUP = "gstack"
"""Name of the group of tasks of Du et al. 2024."""

OWN_TASKS = Path(__file__).with_name("tasks")
"""Task definitions that lm-eval reads in addition to its own."""

_FOLDERS = {
    "lambada_openai": "lambada",
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "logiqa": "logiqa",
    "piqa": "piqa",
    "sciq": "sciq",
    "winogrande": "winogrande",
    "wikitext": "wikitext",
}
"""Tasks of the group and lm-eval's folder of each; loading all of lm-eval's tasks takes seconds."""

_UNSUPPORTED = {
    "UNSAFE_CODE": "it runs code written by a model",
    "MULTIMODAL": "it contains images",
}
"""lm-eval's attributes of unsupported tasks, and the reason in the error message."""

Tasks = dict[str, Any]
"""lm-eval task objects by name."""


def load_tasks(names: tuple[str, ...], data_dir: Path | None) -> Tasks:
    """Load tasks; the name of a group loads each of its tasks.

    Raises InputError if a name is unknown, if data is missing in `data_dir` or cannot be downloaded
    from the hub, and if a task is unsupported.
    """
    # These loggers warn about own task definitions and each failed download attempt.
    for logger in ("lm_eval", "huggingface_hub"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    members = tuple(dict.fromkeys(task for name in names for task in _members(name)))
    tasks: Tasks = _from_hub(members) if data_dir is None else _from_files(members, data_dir)
    for name, task in tasks.items():
        for attribute, reason in _UNSUPPORTED.items():
            if getattr(task, attribute, False):
                raise ConfigError(f"task {name} is not supported: {reason}")
    return tasks


def _members(name: str) -> tuple[str, ...]:
    return tuple(_FOLDERS) if name == GROUP else (name,)


def _from_hub(names: tuple[str, ...]) -> Any:
    manager = TaskManager(include_path=str(OWN_TASKS))
    for name in names:
        if name not in manager.task_index:
            raise ConfigError(
                f"task {name}: lm-eval has no task of this name; see lm-eval ls tasks"
            )
    try:
        return manager.load(list(names))["tasks"]
    except Exception as error:  # datasets and the hub's client raise exceptions of any type
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise DataError(
            f"tasks {', '.join(names)}: cannot load data from the hub: {reason}; set data_dir to "
            "use local files"
        ) from error


def _from_files(names: tuple[str, ...], data_dir: Path) -> Any:
    for name in names:
        if name not in _FOLDERS:
            available = ", ".join((GROUP, *_FOLDERS))
            raise ConfigError(
                f"task {name} cannot be read from local files; available: {available}"
            )
    documents = {name: read_documents(name, data_dir) for name in names}
    folders = {Path(lm_eval.tasks.__file__).parent / _FOLDERS[name] for name in names}
    manager = TaskManager(include_defaults=False, include_path=sorted(map(str, folders)))
    tasks = [{"task": name, "custom_dataset": _splits(docs)} for name, docs in documents.items()]
    loaded = manager.load([{"group": "local", "task": tasks}])
    return loaded["tasks"]


def _splits(docs: list[Doc]) -> Callable[..., dict[str, Dataset]]:
    """Return a function that lm-eval calls for the splits; each has all documents."""
    dataset = Dataset.from_list(docs)
    return lambda **_: dict.fromkeys(("train", "validation", "test"), dataset)
