"""Refuses keys that no run file has, and says which key was meant."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from megagrow.config.schema import RunConfig, StageConfig
from megagrow.config.sections import Section
from megagrow.errors import InputError

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
        raise InputError(f"{origin}: {'; '.join(problems)}")


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
