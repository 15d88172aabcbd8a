"""A run file with what it is built on: another run file, and a profile of the hardware."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megagrow.common.yaml_file import read_mapping
from megagrow.config.includes import Tree, expand, find_file, merge, named_section, search_path
from megagrow.config.keys import DEFAULTS, PARTS, refuse_unknown_keys
from megagrow.config.overrides import refuse_no_effect
from megagrow.errors import InputError


def read_run(path: Path, via: tuple[Path, ...] = ()) -> Tree:
    """The content of a run file, laid on that of the file that it names by `base`, with every named
    part put in its place; `via` are the files that led here.

    `base: gstack-1.1b` is sought as gstack-1.1b.yaml where named parts are. Mappings are merged key
    by key; `stages` and sections given by name replace what the base has. `hardware` is laid on the
    base, and the file's own keys on that. Raises InputError, in one line, for what is wrong with
    any of the files.
    """
    origin, folders = str(path), search_path(path)
    own = read_mapping(path)
    refuse_unknown_keys(own, origin)
    under: Tree = {}
    if "base" in own:
        file = find_file(str(own["base"]), "", folders, f"{origin}: 'base'")
        if file in (via := (*via, path.resolve())):
            trail = " -> ".join(item.stem for item in (*via, file))
            raise InputError(f"{origin}: 'base' is built on itself: {trail}")
        under = read_run(file, via)
    if "hardware" in own:
        under = with_hardware({**under, "hardware": own["hardware"]}, folders, origin)
    named = {key for key in PARTS if isinstance(own.get(key), str) or "base" in _mapping(own, key)}
    under = {key: value for key, value in under.items() if key not in named}
    own = expand({key: own[key] for key in own if key not in ("base", "hardware")}, folders, origin)
    merged = merge(under, own)
    if "stages" not in own:
        for names in _leaves({key: own[key] for key in DEFAULTS if key in own}):
            refuse_no_effect(merged, names, f"{origin}: {'.'.join(names)}")
    return merged


def with_hardware(tree: Tree, folders: Sequence[Path], origin: str) -> Tree:
    """`tree`, with the profile that its key `hardware` names laid upon it: as the defaults of all
    stages, and upon those sections that a stage has of its own."""
    if "hardware" not in tree:
        return tree
    if not isinstance(tree["hardware"], str):
        raise InputError(f"{origin}: 'hardware' should be the name of a file in hardware/")
    profile = named_section(tree["hardware"], "hardware", folders, f"{origin}: 'hardware'")
    laid = merge({key: tree[key] for key in tree if key != "hardware"}, profile)
    if "stages" in tree:
        laid["stages"] = [
            merge(stage, {key: item for key, item in profile.items() if key in stage})
            for stage in tree["stages"]
        ]
    return laid


def _mapping(tree: Tree, key: str) -> Tree:
    value = tree.get(key)
    return value if isinstance(value, dict) else {}


def _leaves(tree: Tree, above: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """The path of each value that is no mapping."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield [*above, key]
