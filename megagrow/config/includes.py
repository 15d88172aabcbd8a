"""Files included by a run file: named sections, the base run file, the hardware profile.

A named section is a file configs/<section>/NAME.yaml.
"""

import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megagrow.common.yaml_file import read_mapping
from megagrow.config.deprecated import rename_deprecated
from megagrow.config.overrides import (
    DEFAULTS,
    PARTS,
    refuse_no_effect,
    refuse_unknown_keys,
    refuse_unknown_part_keys,
)
from megagrow.config.stage_length import LENGTHS, lengths_in
from megagrow.errors import ConfigError

Tree = dict[str, Any]

MOST_LEVELS = 10
"""Maximum length of a chain of included files."""

LONGEST_NAME = 200
"""Maximum characters of a section name; file names have at most 255 bytes."""


def search_path(run_file: Path) -> list[Path]:
    """Return the folders searched for included files, nearest first.

    These are the run file's folder and its parents, each followed by its configs/; the checkout's
    configs/; and the configs installed with the package.
    """
    near = [at for folder in run_file.resolve().parents for at in (folder, folder / "configs")]
    checkout = Path(__file__).resolve().parents[2] / "configs"
    return [*near, checkout, Path(sys.prefix) / "share" / "megagrow" / "configs"]


def expand(tree: Tree, folders: Sequence[Path], origin: str) -> Tree:
    """Return `tree`, the content of a run file, with every named section replaced by its content.

    Raises:
        ConfigError: a named file is missing or includes itself, or a section is neither a mapping
            nor a name.
    """
    expanded = _expand_sections(tree, "", folders, origin)
    if "stages" not in tree:
        return expanded
    stages = tree["stages"]
    if not isinstance(stages, list):
        raise ConfigError(f"{origin}: 'stages' is not a list of stages")
    for index, stage in enumerate(stages):
        if not isinstance(stage, dict):
            raise ConfigError(f"{origin}: 'stages.{index}' is not a mapping of keys to values")
    prefixed = [(f"stages.{index}.", stage) for index, stage in enumerate(stages)]
    return expanded | {"stages": [_expand_sections(s, p, folders, origin) for p, s in prefixed]}


def merge(under: Tree, over: Tree) -> Tree:
    """Merge two trees: mappings key by key, other values from `over`."""
    inner = {
        key: merge(under[key], value)
        for key, value in over.items()
        if isinstance(value, dict) and isinstance(under.get(key), dict)
    }
    return {**under, **over, **inner}


def _expand_sections(tree: Tree, prefix: str, folders: Sequence[Path], origin: str) -> Tree:
    expanded = dict(tree)
    for section in tree.keys() & set(PARTS):
        where = f"{origin}: '{prefix}{section}'"
        expanded[section] = named_section(tree[section], section, folders, where)
    return expanded


def named_section(
    value: Any, section: str, folders: Sequence[Path], where: str, via: tuple[str, ...] = ()
) -> Tree:
    """Return the content of a section that is a mapping, a name, or a mapping with a base.

    `via` are the names included so far. Raises ConfigError as `expand` does; the message starts
    with `where`.
    """
    if isinstance(value, str):
        value = {"base": value}
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is neither a mapping nor the name of a file in {section}/")
    if "base" not in value:
        return value
    name = str(value["base"])
    if name in via:
        raise ConfigError(f"{where} includes itself: {' -> '.join([*via, name])}")
    _check_depth(where, len(via))
    file = find_file(name, section, folders, where)
    part = read_mapping(file)
    refuse_unknown_part_keys(part, section, str(file))
    base = named_section(part, section, folders, where, (*via, name))
    return merge(base, {key: item for key, item in value.items() if key != "base"})


def _check_depth(where: str, depth: int) -> None:
    if depth > MOST_LEVELS:
        raise ConfigError(f"{where} is included through more than {MOST_LEVELS} files; merge some")


def find_file(name: str, section: str, folders: Sequence[Path], where: str) -> Path:
    """Return the first SECTION/NAME.yaml in `folders`; without a section, NAME.yaml.

    Raises:
        ConfigError: no folder has the file; the message names the closest one.
    """
    if len(name) > LONGEST_NAME:
        raise ConfigError(
            f"{where}: '{name[:20]}...' is longer than {LONGEST_NAME} characters; not a file name"
        )
    for folder in folders:
        file = folder / section / f"{name}.yaml"
        if file.is_file():
            return file
    known = sorted({file.stem for folder in folders for file in _named_files(folder / section)})
    near = difflib.get_close_matches(name.removesuffix(".yaml"), known, n=1, cutoff=0.5)
    listed = f"known: {', '.join(known)}" if known else f"no {section}/ contains any file"
    hint = f"did you mean '{near[0]}'?" if near else listed
    sought = Path(section, f"{name}.yaml")
    raise ConfigError(f"{where} = '{name}': {sought} not found; {hint}")


def find_run_file(path: Path) -> Path:
    """Return `path` if it exists or has an extension, else the run file of that name.

    It is searched in the search path of the current directory: `gstack-1.1b`, `demo/gstack`.

    Raises:
        ConfigError: no folder has it; the message names the closest one.
    """
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; give a run file")
    if path.exists():
        return path
    if path.suffix in (".yaml", ".yml"):
        files = {file.stem.lower(): file for file in path.parent.glob("*.y*ml")}
        near = difflib.get_close_matches(path.stem.lower(), files, n=1)
        hint = f"did you mean '{files[near[0]]}'?" if near else "see megagrow config ls"
        raise ConfigError(f"{path}: no such file; {hint}")
    return find_file(str(path), "", search_path(Path("run.yaml")), "run file")


def files_in(section: str) -> dict[str, Path]:
    """Return the files of configs/SECTION/ in the search path of the current directory, by name.

    Of several files of one name, the nearest is returned, as `find_file` does.
    """
    folders = search_path(Path("run.yaml"))
    inside = [folder / section for folder in folders if folder.name == "configs"]
    return {file.stem: file for folder in reversed(inside) for file in _named_files(folder)}


def _named_files(folder: Path) -> Iterator[Path]:
    """Return the files of a folder that are found by name; editors leave hidden ones."""
    return folder.glob("[!.]*.yaml")


def read_run(path: Path, via: tuple[Path, ...] = ()) -> Tree:
    """Return the content of a run file, merged over its base, with named sections expanded.

    `base: gstack-1.1b` is found as gstack-1.1b.yaml in the search path. Mappings are merged key by
    key; a list of `stages`, and sections that are names, replace those of the base. A mapping
    `stages: {1: ...}` is merged into single stages. The `hardware` profile is merged over the base,
    and the file's own keys over both. `via` are the files included so far.

    Raises:
        ConfigError: one of the files is invalid; the message is one line.
    """
    origin, folders = str(path), search_path(path)
    content = read_mapping(path)
    under = _read_base(str(content["base"]), path, folders, via) if "base" in content else {}
    changes_stages = isinstance(content.get("stages"), dict)
    if changes_stages:
        changes = _listed_changes(content["stages"], under.get("stages", []), origin)
        content = content | {"stages": changes}
    own = rename_deprecated(content, origin)
    refuse_unknown_keys(own, origin)
    if "hardware" in own:
        under = with_hardware({**under, "hardware": own["hardware"]}, folders, origin)
    own = {key: own[key] for key in own if key not in ("base", "hardware")}
    expanded = expand(own, folders, origin)
    if changes_stages:
        pairs = zip(under.get("stages", []), own["stages"], expanded["stages"], strict=True)
        expanded["stages"] = [_merge_over(*pair) for pair in pairs]
    merged = _merge_over(under, own, expanded)
    if changes_stages or "stages" not in own:
        for names in _leaves({key: expanded[key] for key in DEFAULTS if key in own}):
            refuse_no_effect(merged, names, f"{origin}: {'.'.join(names)}")
    return merged


def _read_base(name: str, path: Path, folders: Sequence[Path], via: tuple[Path, ...]) -> Tree:
    """Return the content of the base `name` of the run file `path`, as `read_run`."""
    where = f"{path}: 'base'"
    file = find_file(name, "", folders, where)
    if file in (via := (*via, path.resolve())):
        trail = " -> ".join(item.stem for item in (*via, file))
        raise ConfigError(f"{where} includes itself: {trail}")
    _check_depth(where, len(via))
    return read_run(file, via)


def _listed_changes(changes: Tree, stages: list[Tree], origin: str) -> list[Any]:
    """Return the mapping `stages: {1: ...}` of a run file as one change per stage of its base."""
    known = [str(index) for index in range(len(stages))]
    for index in changes:
        if str(index) not in known:
            listed = f"the base has {', '.join(known)}" if known else "no base has a list of stages"
            raise ConfigError(f"{origin}: 'stages.{index}' does not exist; {listed}")
    given = {str(index): change for index, change in changes.items()}
    return [given.get(index, {}) for index in known]


def _merge_over(under: Tree, own: Tree, expanded: Tree) -> Tree:
    """Merge a tree over that of a base. `expanded` is `own` with its named sections, which replace
    those of the base, as a length replaces a length of another key."""
    replaced = set(LENGTHS) if lengths_in(own) else set()
    replaced |= {key for key in PARTS if isinstance(own.get(key), str)}
    replaced |= {key for key in PARTS if "base" in _mapping(own, key)}
    return merge({key: value for key, value in under.items() if key not in replaced}, expanded)


def with_hardware(tree: Tree, folders: Sequence[Path], origin: str) -> Tree:
    """Return `tree` with the profile named by its key `hardware` merged over it: over the defaults
    of all stages, and over the sections that single stages set."""
    if "hardware" not in tree:
        return tree
    if not isinstance(tree["hardware"], str):
        raise ConfigError(f"{origin}: 'hardware' is not the name of a file in hardware/")
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
    """Yield the path of each value that is not a mapping."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))
        else:
            yield [*above, key]
