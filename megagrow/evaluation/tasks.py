"""lm-eval's tasks by name: from the hub as lm-eval loads them, or the tasks of `gstack` from files.

Prompts, choices and metrics are lm-eval's own in both cases; only where the documents come from
differs.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.tasks import TaskManager

from megagrow.errors import DataError
from megagrow.evaluation.local_data import Doc, read_documents

GROUP = "gstack"
"""The tasks of Du et al. 2024."""

OWN_TASKS = Path(__file__).with_name("tasks")
"""Definitions that lm-eval reads beside its own."""

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
"""The tasks of the group, and where lm-eval defines each: reading all its tasks takes seconds."""

Tasks = dict[str, Any]
"""lm-eval's tasks by their names."""


def load_tasks(names: tuple[str, ...], data_dir: Path | None) -> Tasks:
    """What lm-eval evaluates; a name that stands for several tasks gives each of them.

    Errors: InputError for a name that is not known, data that is missing in `data_dir`, data that
    cannot be had from the hub, and tasks that a language model is not enough for.
    """
    for name in ("lm_eval", "huggingface_hub"):  # they warn of own tasks, and of each attempt
        logging.getLogger(name).setLevel(logging.ERROR)
    asked = tuple(dict.fromkeys(name for given in names for name in _members(given)))
    found: Tasks = _from_hub(asked) if data_dir is None else _from_files(asked, data_dir)
    for name, task in found.items():
        for trait, what in (
            ("UNSAFE_CODE", "runs code of a model"),
            ("MULTIMODAL", "shows images"),
        ):
            if getattr(task, trait, False):
                raise DataError(f"task {name}: it {what}, which is not done here")
    return found


def _members(name: str) -> tuple[str, ...]:
    return tuple(_FOLDERS) if name == GROUP else (name,)


def _from_hub(names: tuple[str, ...]) -> Any:
    manager = TaskManager(include_path=str(OWN_TASKS))
    for name in names:
        if name not in manager.task_index:
            raise DataError(f"task {name}: lm-eval knows none of this name; see lm-eval ls tasks")
    try:
        return manager.load(list(names))["tasks"]
    except Exception as error:  # datasets and the hub's client raise whatever they stumble over
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise DataError(
            f"tasks {', '.join(names)}: no data from the hub: {reason}; local files need none "
            "(data_dir)"
        ) from error


def _from_files(names: tuple[str, ...], data_dir: Path) -> Any:
    for name in names:
        if name not in _FOLDERS:
            known = ", ".join((GROUP, *_FOLDERS))
            raise DataError(f"task {name}: from local files there are {known}")
    found = {name: read_documents(name, data_dir) for name in names}
    folders = {Path(lm_eval.tasks.__file__).parent / _FOLDERS[name] for name in names}
    manager = TaskManager(include_defaults=False, include_path=sorted(map(str, folders)))
    tasks = [{"task": name, "custom_dataset": _splits(docs)} for name, docs in found.items()]
    loaded = manager.load([{"group": "local", "task": tasks}])
    return loaded["tasks"]


def _splits(docs: list[Doc]) -> Callable[..., dict[str, Dataset]]:
    """What lm-eval calls to get a task's documents: the same ones, whichever split it evaluates."""
    made = Dataset.from_list(docs)
    return lambda **_: dict.fromkeys(("train", "validation", "test"), made)
