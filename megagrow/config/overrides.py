"""`--set path.to.key=value`: changes to a run file made on the command line."""

import difflib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, get_args

from megagrow.common.yaml_file import parse_yaml
from megagrow.config.deprecated import rename_override
from megagrow.config.schema import RunConfig, StageConfig
from megagrow.config.sections import Section
from megagrow.config.stage_length import LENGTHS
from megagrow.errors import ConfigError


def apply_override(tree: dict[str, Any], text: str) -> dict[str, Any]:
    """A copy of `tree`, the content of a run file, with the one change that `text` asks for.

    The value is read as YAML. A number in the path is a place in a list, counted from 0. Raises
    InputError if the text has no `=`, the path does not exist, or the change would do nothing.
    """
    origin = f"--set {text}"
    path, equals, written = text.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{origin}: should be path.to.key=value")
    if names == ["base"]:
        raise ConfigError(f"{origin}: give the path of that run file in place of this one's")
    if names[-1] == "base":
        raise ConfigError(
            f"{origin}: name the part itself, as in --set {'.'.join(names[:-1])}=NAME"
        )
    names, value = rename_override(names, parse_yaml(written, origin), origin)
    changed = deepcopy(tree)
    _put(changed, names, value, origin)
    refuse_no_effect(changed, names, origin)
    return changed


def refuse_no_effect(tree: dict[str, Any], names: list[str], origin: str) -> None:
    """Raises InputError for a default that every stage sets for itself: changing it would silently
    do nothing. `names` is its path in `tree`, the content of a run file."""
    stages = tree.get("stages")
    if names[0] not in DEFAULTS or not stages:
        return
    # A stage's own model replaces the default one whole, whichever keys it holds; so does its
    # length, by whichever key it is given.
    paths = [names[:1] if names[0] == "model" else names]
    if names[0] in LENGTHS:
        paths = [[key] for key in LENGTHS]
    if all(any(_holds(stage, path) for path in paths) for stage in stages):
        places = f"stages.0.{'.'.join(names)} to stages.{len(stages) - 1}.{'.'.join(names)}"
        raise ConfigError(f"{origin}: has no effect, for every stage has its own; set {places}")


def _put(node: Any, names: list[str], value: Any, origin: str, above: str = "") -> None:
    """Sets what stands at `names` below `node`; mappings that are not there yet are made."""
    key: Any = _index(node, names[0], above, origin) if isinstance(node, list) else names[0]
    if len(names) == 1:
        node[key] = value
        return
    path = f"{above}{names[0]}"
    inner = node[key] if isinstance(node, list) else node.get(key)
    if not isinstance(inner, dict | list):
        if names[1].isdecimal():
            raise ConfigError(f"{origin}: there is no list at '{path}'")
        inner = node[key] = {}
    _put(inner, names[1:], value, origin, f"{path}.")


def _index(items: list[Any], name: str, above: str, origin: str) -> int:
    if name.isdecimal() and int(name) < len(items):
        return int(name)
    place = above.removesuffix(".")
    raise ConfigError(f"{origin}: '{place}' has {len(items)} entries, counted from 0; not '{name}'")


def _holds(node: Any, names: list[str]) -> bool:
    for name in names:
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True


Keys = dict[str, type[Section] | None]
"""The keys of one section, each with the section that stands under it, if one does."""


DEFAULTS = (
    *("model", "tokens", "at_tokens", "at_flops"),
    *("parallel", "kernels", "batch", "optimizer", "schedule"),
)
"""Keys of a stage that may also stand at the top, as the defaults of every stage."""


PARTS = ("model", "data", "parallel", "batch", "optimizer", "schedule")
"""Sections that may be the name of a file, or a mapping with `base: NAME`."""


BUILT_ON = {
    "base": (
        "The run file that this one is built on, sought as `NAME.yaml` where named parts are. This "
        "file holds what differs: mappings are merged key by key; `stages`, and sections given by "
        "name, replace those of the base."
    ),
    "hardware": (
        "A profile of the hardware, `hardware/NAME.yaml`, laid on the base: it sets `parallel`, "
        "`kernels` and `batch` of all stages. This file's own keys win over it, it wins over the "
        "base; given by `--set` it wins over the file."
    ),
}
"""Keys of the top that stand in no model, for what they name is put in their place; each with its
meaning."""


HARDWARE = ("parallel", "kernels", "batch")
"""Sections of a stage that a profile of the hardware may set."""


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
"""What other programs call some of our keys."""


def refuse_unknown_keys(tree: dict[str, Any], origin: str) -> None:
    """Raises InputError if the top of a run file, or anything under it, has a key of no meaning.

    `origin` is where the tree was read from; the error names it and each key's full path.
    """
    _refuse(_unknown(tree, {**run_keys(), **dict.fromkeys(BUILT_ON)}, ""), origin)


def refuse_unknown_part_keys(tree: dict[str, Any], section: str, origin: str) -> None:
    """The same for the file of a named part: the content of one `section`."""
    known = run_keys()
    profile = {key: known[key] for key in HARDWARE}
    keys = profile if section == "hardware" else _keys_of(known[section])
    _refuse(_unknown(tree, {**keys, "base": None}, ""), origin)


def run_keys() -> Keys:
    """The keys of the top of a run file."""
    stage = _keys_of(StageConfig)
    return {**_keys_of(RunConfig), **{key: stage[key] for key in DEFAULTS}}


def _refuse(unknown: Iterator[tuple[str, str]], origin: str) -> None:
    problems = [f"unknown key '{path}'; {hint}" for path, hint in unknown]
    if problems:
        raise ConfigError(f"{origin}: {'; '.join(problems)}")


def _unknown(tree: dict[str, Any], keys: Keys, prefix: str) -> Iterator[tuple[str, str]]:
    """The path of each unknown key with a hint."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if key not in keys:
            yield path, _hint(str(key), keys, prefix)
        elif section := keys[key]:
            inner = {**_keys_of(section), **({"base": None} if key in PARTS else {})}
            for place, item in _mappings(value, path):
                yield from _unknown(item, inner, f"{place}.")


def _mappings(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The mappings in a section's place, itself or a list's, each with its path."""
    if isinstance(value, dict):
        yield path, value
    elif isinstance(value, list):
        yield from ((f"{path}.{i}", item) for i, item in enumerate(value) if isinstance(item, dict))


def _hint(key: str, keys: Keys, prefix: str) -> str:
    """The nearest key of this place, else of the whole file, else all that this place allows."""
    here = {name: f"{prefix}{name}" for name in keys}
    # Of several paths that end in the same name the shortest wins.
    anywhere = sorted(_everywhere(run_keys(), ""), key=lambda found: -found[1].count("."))
    for known in (here, dict(anywhere)):
        named = known | {a: known[name] for a, name in ALIASES.items() if name in known}
        near = difflib.get_close_matches(key, named, n=1, cutoff=0.7)
        if near:
            return f"did you mean '{named[near[0]]}'?"
    return f"allowed here: {', '.join(keys)}"


def _everywhere(keys: Keys, prefix: str) -> Iterator[tuple[str, str]]:
    """Every key of a run file with each path at which it may stand."""
    for key, section in keys.items():
        yield key, f"{prefix}{key}"
        inner = f"{prefix}stages.N." if key == "stages" else f"{prefix}{key}."
        yield from _everywhere(_keys_of(section), inner)


def _keys_of(section: type[Section] | None) -> Keys:
    if section is None:
        return {}
    fields = section.model_fields.items()
    return {name: section_in(f.annotation) for name, f in fields if not f.exclude}


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, itself, in a list or optionally."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_in, get_args(annotation))), None)
