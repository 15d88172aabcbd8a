"""Load a run file: read, override, fill in defaults, validate; and write one.

Relative paths in a run file are relative to the current directory.
"""

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megagrow.common.sizes import format_count, format_large
from megagrow.config.data import with_run_defaults, with_stage_defaults
from megagrow.config.deprecated import rename_recorded
from megagrow.config.growth import GSTACK, GSTACK_OPERATOR
from megagrow.config.includes import (
    expand,
    find_run_file,
    merge,
    read_run,
    search_path,
    with_hardware,
)
from megagrow.config.overrides import (
    DEFAULTS,
    MOST_PROBLEMS,
    REPLACED,
    apply_override,
    first_problems,
    refuse_unknown_keys,
)
from megagrow.config.schema import RunConfig, StageConfig
from megagrow.config.stage_length import LENGTHS, lengths_in, settled, unsettled
from megagrow.config.validation import problems
from megagrow.errors import ConfigError, printable

logger = logging.getLogger(__name__)

KeyPath = tuple[int | str, ...]

FEW_VALUES = 6
"""Number of allowed values that an error lists, instead of the closest one."""


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the validated run in the YAML file at `path`, with `--set` overrides applied in order.

    `path` may be the name of a file in the search path, such as `gstack-1.1b`.
    A section may be the name of a file, `model: llama-1.1b`, or have one as `base: llama-1.1b`; see
    `includes.search_path`. The sections and the length of a stage at the top (`DEFAULTS`) are
    defaults of all stages: a stage's own keys have precedence, and its own model, corpora or length
    replace the default entirely. Without `stages`, the top is the only stage. `base` includes
    another run file, `hardware` a hardware profile with keys that do not change the result; see
    `includes.read_run`.

    Raises:
        ConfigError: the run file is invalid; the message is one line with all problems.
    """
    path = find_run_file(path)
    origin = str(path)
    folders = search_path(path)
    tree = read_run(path)
    for text in overrides:
        tree = apply_override(tree, text)
        refuse_unknown_keys(tree, f"--set {text}")
        tree = with_hardware(expand(tree, folders, f"--set {text}"), folders, f"--set {text}")
    try:
        run = RunConfig.model_validate(_with_stages(tree, origin))
    except ValidationError as error:
        raise ConfigError(f"{origin}: {'; '.join(_explained(error, tree))}") from error
    if texts := problems(run):
        raise ConfigError(f"{origin}: {'; '.join(first_problems(texts))}")
    try:
        return settled(run)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from error


def recorded_run(values: Mapping[str, Any]) -> RunConfig:
    """Return the run whose dump is recorded in a checkpoint, by this or another version.

    Keys that this version does not have are left out, with a warning.

    Raises:
        ValidationError: `values` is not a dump of a run.
    """
    tree = with_stage_defaults(rename_recorded(values))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        places = [each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"]
        if not places:
            raise
    for *sections, key in places:
        section: Any = tree
        for each in sections:
            section = section[each]
        del section[key]
    keys = ", ".join(".".join(map(str, place)) for place in places)
    logger.warning("recorded by another version, ignored: %s", printable(keys))
    return RunConfig.model_validate(tree)


def _with_stages(tree: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return the tree in the format of RunConfig: defaults at the top are moved into all stages.

    `data`, which is also a section of the run, is distributed by RunConfig.
    """
    keys = [key for key in DEFAULTS if key not in RunConfig.model_fields]
    defaults = {key: tree[key] for key in keys if key in tree}
    stages = [_filled(defaults, stage) for stage in tree.get("stages", [{}])]
    for index, stage in enumerate(stages):
        _refuse_two_lengths(stage, f"stages.{index}." if "stages" in tree else "", origin)
    rest = {key: tree[key] for key in tree if key not in keys}
    return rest | {"stages": [unsettled(stage) for stage in stages]}


def _filled(defaults: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    model = {"model": stage["model"]} if "model" in stage else {}
    if lengths_in(stage):
        defaults = {key: value for key, value in defaults.items() if key not in LENGTHS}
    return merge(defaults, stage) | model


def _refuse_two_lengths(stage: dict[str, Any], place: str, origin: str) -> None:
    if len(lengths := lengths_in(stage)) > 1:
        keys = " and ".join(f"'{place}{key}'" for key in lengths)
        raise ConfigError(
            f"{origin}: {keys} each set the length of one stage; keep one and remove the others or "
            "set them to null"
        )


def _explained(error: ValidationError, tree: dict[str, Any]) -> list[str]:
    """Return one text per pydantic error, with the key's path in the user's file."""
    return first_problems(dict.fromkeys(_texts(error, tree)))


def _texts(error: ValidationError, tree: dict[str, Any]) -> Iterator[str]:
    # One value can cause several errors that have the same text.
    for detail in error.errors()[: 10 * MOST_PROBLEMS]:
        path = ".".join(map(str, _written_at(detail["loc"], tree)))
        if detail["type"] == "default_factory_not_called":
            continue  # depends on a key that is reported itself
        if detail["type"] == "missing":
            yield f"'{path}' is missing"
            continue
        if detail["type"] == "literal_error" and isinstance(detail["input"], str):
            yield f"'{path}' = {detail['input']!r}: {_closest(detail)}"
            continue
        problem = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
        problem = problem.partition(", unable to parse")[0]
        if detail["type"] == "model_type":  # pydantic's text names a class
            problem = "should be a mapping of keys to values"
        value = repr(detail["input"])
        shown = value if len(value) <= 60 else f"{value[:57]}..."
        yield f"'{path}' = {shown}: {problem[0].lower()}{problem[1:]}"


def _closest(error: Mapping[str, Any]) -> str:
    """Return the allowed values, or of many the one closest to the wrong one."""
    allowed = error["ctx"]["expected"]
    values = re.findall("'([^']*)'", allowed)
    aliases = [GSTACK] if GSTACK_OPERATOR in values else []
    near = difflib.get_close_matches(error["input"], [*values, *aliases], n=1)
    if near and len(values) > FEW_VALUES:
        return f"not known; did you mean '{near[0]}'?"
    return f"should be {allowed}"


def _written_at(place: KeyPath, tree: dict[str, Any]) -> KeyPath:
    """Return the path in the user's file of the value at `place` in the filled-in tree."""
    if place[:2] == ("data", "validation") and _reach(tree, place) < 3:
        return (*place[:2], *place[3:])  # a list, which has no name
    if place[0] != "stages" or len(place) < 3 or place[2] not in DEFAULTS:
        return place
    if "stages" not in tree:
        return place[2:]
    in_stage, at_top = _reach(tree, place), _reach(tree, place[2:])
    replaced = any(place[2:][: len(key)] == key and in_stage >= 2 + len(key) for key in REPLACED)
    return place if replaced or in_stage >= at_top + 2 else place[2:]


def _reach(tree: Any, place: KeyPath) -> int:
    """Return the number of leading keys of `place` that exist in `tree`."""
    for depth, key in enumerate(place):
        inside = dict(enumerate(tree)) if isinstance(tree, list) else tree
        if not isinstance(inside, dict) or key not in inside:
            return depth
        tree = inside[key]
    return len(place)


def to_yaml(run: RunConfig) -> str:
    """Return `run` as YAML with all keys; loading it gives an equal run.

    A stage's length is written under the key that set it, so that it is recomputed when other keys
    of the written file are changed. Keys of `data` that are equal in all stages are written once.
    """
    tree = _readable(run.model_dump(mode="json"))
    stages = [_as_written(*pair) for pair in zip(run.stages, tree["stages"], strict=True)]
    return yaml.safe_dump(with_run_defaults(tree | {"stages": stages}), sort_keys=False)


def _as_written(stage: StageConfig, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the dump of a stage with the length key and the `auto` values of its run file."""
    *_, length = lengths_in(tree)  # `tokens` is always set and comes first
    left_out = [key for key in LENGTHS if key != length]
    shown = {key: value for key, value in tree.items() if key not in left_out}
    if stage.batch.micro_batch_size_auto:
        shown["batch"] = tree["batch"] | {"micro_batch_size": "auto"}
    return shown | {"tokens": "auto"} if stage.tokens_auto else shown


def _readable(value: Any, key: str = "") -> Any:
    """Return `value` with token and FLOP counts in short form, such as 10B."""
    if isinstance(value, dict):
        return {inner: _readable(item, inner) for inner, item in value.items()}
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if value is None:
        return None
    form = {"tokens": format_count, "flops": format_large}.get(key.split("_")[-1])
    return form(value) if form and isinstance(value, int) else value
