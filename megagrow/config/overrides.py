"""Command-line overrides `--set path.to.key=value`, and errors for unknown keys."""

import difflib
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import islice
from typing import Any, get_args, get_origin

from megagrow.common.yaml_file import parse_yaml
from megagrow.config.data import MEASUREMENTS, RunFileData
from megagrow.config.deepspeed import SET_BY
from megagrow.config.deprecated import rename_override
from megagrow.config.schema import RunConfig, StageConfig
from megagrow.config.sections import Section
from megagrow.config.stage_length import LENGTHS
from megagrow.errors import ConfigError


def apply_override(tree: dict[str, Any], text: str) -> dict[str, Any]:
    """Return a copy of `tree`, the content of a run file, with the override `text` applied.

    The value is parsed as YAML. A number in the path is a list index, counted from 0.

    Raises:
        ConfigError: the text has no `=`, the path does not exist, or the override has no effect.
    """
    origin = f"--set {text}"
    path, equals, written = text.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{origin}: not an override; use path.to.key=value")
    if names == ["base"]:
        raise ConfigError(
            f"{origin}: base cannot be overridden; use the other run file on the command line"
        )
    if names[-1] == "base":
        raise ConfigError(
            f"{origin}: base cannot be overridden; use --set {'.'.join(names[:-1])}=NAME"
        )
    names, value = rename_override(names, parse_yaml(written, origin), origin)
    changed = deepcopy(tree)
    _put(changed, names, value, origin)
    refuse_no_effect(changed, names, origin)
    return changed


def refuse_no_effect(tree: dict[str, Any], names: list[str], origin: str) -> None:
    """Reject an override of a default that all stages override, which would have no effect.

    Raises:
        ConfigError: all stages of `tree`, the content of a run file, set the path `names`.
    """
    stages = tree.get("stages")
    if names[0] not in DEFAULTS or not stages:
        return
    # A stage's model and its list of corpora replace the default entirely, whichever keys they
    # have. So does its length, whichever of the three keys sets it.
    replaced = next((each for each in REPLACED if names[: len(each)] == list(each)), names)
    paths = [list(replaced)]
    if names[0] in LENGTHS:
        paths = [[key] for key in LENGTHS]
    if all(any(_holds(stage, path) for path in paths) for stage in stages):
        places = " or ".join(f"stages.{index}.{'.'.join(names)}" for index in range(len(stages)))
        raise ConfigError(f"{origin}: has no effect, all stages set their own; set {places}")


def _put(node: Any, names: list[str], value: Any, origin: str, above: str = "") -> None:
    """Set the value at the path `names` below `node`; create missing mappings."""
    key: Any = _index(node, names[0], above, origin) if isinstance(node, list) else names[0]
    if len(names) == 1:
        node[key] = value
        return
    path = f"{above}{names[0]}"
    inner = node[key] if isinstance(node, list) else node.get(key)
    if not isinstance(inner, dict | list):
        if names[1].isdecimal():
            raise ConfigError(f"{origin}: '{path}' is not a list")
        inner = node[key] = {}
    _put(inner, names[1:], value, origin, f"{path}.")


def _index(items: list[Any], name: str, above: str, origin: str) -> int:
    if name.isdecimal() and int(name) < len(items):
        return int(name)
    place = above.removesuffix(".")
    raise ConfigError(
        f"{origin}: '{place}' has no index '{name}'; it has {len(items)} entries, counted from 0"
    )


def _holds(node: Any, names: list[str]) -> bool:
    for name in names:
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


REPLACED = (("model",), ("data", "train"))
"""Defaults of all stages that a stage replaces entirely instead of key by key."""


Keys = dict[str, Any]
"""Keys of one section, each with the type of its field; None without a subsection."""


DEFAULTS = (
    *("model", "data", "tokens", "at_tokens", "at_flops"),
    *("parallel", "kernels", "deepspeed", "batch", "optimizer", "schedule"),
    *MEASUREMENTS,
)
"""Keys of a stage that may also be set at the top, as defaults of all stages. `data` at the top
also has the keys of the run's own section."""


PARTS = ("model", "data", "parallel", "batch", "optimizer", "schedule")
"""Sections that may be the name of a file, or a mapping with `base: NAME`."""


BUILT_ON = {
    "base": (
        "Run file that this one extends, found as `NAME.yaml` in the search path of named "
        "sections. Mappings are merged key by key; a list of `stages`, and sections that are "
        "names, replace those of the base. `stages: {1: {tokens: 2M}}` changes single stages of "
        "the base, counted from 0."
    ),
    "hardware": (
        "Hardware profile, `hardware/NAME.yaml`, which sets `parallel`, `kernels` and `batch` of "
        "all stages. It has precedence over the base and is overridden by this file's own keys; "
        "with `--set` it has precedence over the file."
    ),
}
"""Top-level keys that are replaced by the files they name, with their descriptions."""


HARDWARE = ("parallel", "kernels", "batch")
"""Sections of a stage that a hardware profile may set."""


ALIASES = {
    "learning_rate": "lr",
    "clip_grad": "gradient_clipping",
    "tp": "tensor_model_parallel_size",
    "tensor_parallel_size": "tensor_model_parallel_size",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "num_query_groups": "num_key_value_heads",
    "seq_length": "sequence_length",
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
}
"""Names of keys in other programs -> our key, for hints."""


def refuse_unknown_keys(tree: dict[str, Any], origin: str) -> None:
    """Reject unknown keys in the content of a run file.

    Raises:
        ConfigError: names `origin`, the source of the tree, and the full path of each unknown key.
    """
    _refuse(_unknown(tree, {**run_keys(), **dict.fromkeys(BUILT_ON)}, ""), origin)


def refuse_unknown_part_keys(tree: dict[str, Any], section: str, origin: str) -> None:
    """Reject unknown keys in the file of a named `section`."""
    known = run_keys()
    profile = {key: known[key] for key in HARDWARE}
    keys = profile if section == "hardware" else _keys_of(known[section])
    _refuse(_unknown(tree, {**keys, "base": None}, ""), origin)


def run_keys() -> Keys:
    """Return the top-level keys of a run file."""
    stage = _keys_of(StageConfig)
    return {**_keys_of(RunConfig), **{key: stage[key] for key in DEFAULTS}, "data": RunFileData}


MOST_PROBLEMS = 20
"""Maximum number of problems in one message; hints take time that is proportional to their
number."""


def first_problems(texts: Iterable[str]) -> list[str]:
    """Return the first problems, and a note if there are more."""
    first = list(islice(texts, MOST_PROBLEMS + 1))
    return first if len(first) <= MOST_PROBLEMS else [*first[:-1], "and more"]


def _refuse(unknown: Iterator[tuple[str, str]], origin: str) -> None:
    if problems := first_problems(f"unknown key '{path}'; {hint}" for path, hint in unknown):
        raise ConfigError(f"{origin}: {'; '.join(problems)}")


def _unknown(tree: dict[str, Any], keys: Keys, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the path of each unknown key with a hint."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if key not in keys:
            yield path, _hint(str(key), keys, prefix)
        elif kind := keys[key]:
            inner = {**_keys_of(kind), **({"base": None} if key in PARTS else {})}
            for place, item in _mappings(value, path, item_path(kind)):
                yield from _unknown(item, inner, f"{place}.")


def _mappings(value: Any, path: str, items: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each mapping of a section, or of sections at the `item_path` items, with its path."""
    if isinstance(value, dict) and items.startswith(".NAME"):
        for name, item in value.items():
            yield from _mappings(item, f"{path}.{name}", items.removeprefix(".NAME"))
    elif isinstance(value, dict):
        yield path, value
    elif isinstance(value, list):
        yield from ((f"{path}.{i}", item) for i, item in enumerate(value) if isinstance(item, dict))


def _hint(key: str, keys: Keys, prefix: str) -> str:
    """Return the closest key of this section, else of the file, else all keys of the section."""
    if "deepspeed." in prefix and key in SET_BY:
        return f"set '{SET_BY[key]}' instead"
    here = {name: f"{prefix}{name}" for name in keys}
    # Of several paths that end in the same name, the shortest is kept.
    anywhere = sorted(_everywhere(run_keys(), ""), key=lambda item: -item[1].count("."))
    for known in (here, dict(anywhere)):
        named = known | {a: known[name] for a, name in ALIASES.items() if name in known}
        near = difflib.get_close_matches(key, named, n=1, cutoff=0.7)
        if near:
            return f"did you mean '{named[near[0]]}'?"
    return f"allowed here: {', '.join(keys)}"


def _everywhere(keys: Keys, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield every key of a run file with each of its paths."""
    for key, section in keys.items():
        yield key, f"{prefix}{key}"
        inner = f"{prefix}stages.N." if key == "stages" else f"{prefix}{key}."
        yield from _everywhere(_keys_of(section), inner)


def _keys_of(annotation: Any) -> Keys:
    section = section_in(annotation)
    fields = {} if section is None else section.model_fields
    kinds = ((name, f.annotation) for name, f in fields.items() if not f.exclude)
    return {name: kind if section_in(kind) else None for name, kind in kinds}


def section_in(annotation: Any) -> type[Section] | None:
    """Return the section class in a field's type, directly, in a list or optional; else None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_in, get_args(annotation))), None)


def item_path(annotation: Any) -> str:
    """Return the path from a field to the sections in it.

    It is empty for a section, `.N` for a list of sections and `.NAME.N` for lists by name.
    """
    step = {list: ".N", dict: ".NAME"}.get(get_origin(annotation), "")
    inner = next(filter(section_in, get_args(annotation)), None)
    return step + item_path(inner) if inner is not None else ""
