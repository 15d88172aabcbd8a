"""Named parts: a section of a run file kept in a file of its own, under configs/<section>/."""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagrow.common.yaml_file import read_mapping
from megagrow.config.keys import PARTS, refuse_unknown_part_keys
from megagrow.errors import InputError

Tree = dict[str, Any]

LONGEST_NAME = 200
"""Characters; a file's name has at most 255 bytes."""


def search_path(run_file: Path) -> list[Path]:
    """The folders that hold named parts, nearest first.

    The run file's folder and those above it, each with its configs/; the checkout's configs/; and
    the configs that came with the installed package.
    """
    near = [at for folder in run_file.resolve().parents for at in (folder, folder / "configs")]
    checkout = Path(__file__).resolve().parents[2] / "configs"
    return [*near, checkout, Path(sys.prefix) / "share" / "megagrow" / "configs"]


def expand(tree: Tree, folders: Sequence[Path], origin: str) -> Tree:
    """`tree`, the content of a run file, with every named part put in its place.

    Raises InputError for a part that is not there, for one built on itself, and for sections that
    are neither a mapping nor a name.
    """
    expanded = _expand_sections(tree, "", folders, origin)
    if "stages" not in tree:
        return expanded
    stages = tree["stages"]
    if not isinstance(stages, list):
        raise InputError(f"{origin}: 'stages' should be a list of stages")
    for index, stage in enumerate(stages):
        if not isinstance(stage, dict):
            raise InputError(f"{origin}: 'stages.{index}' should be a mapping of keys to values")
    prefixed = [(f"stages.{index}.", stage) for index, stage in enumerate(stages)]
    return expanded | {"stages": [_expand_sections(s, p, folders, origin) for p, s in prefixed]}


def merge(under: Tree, over: Tree) -> Tree:
    """`over` laid upon `under`: mappings key by key, anything else replaced."""
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
    """A section's content, whatever way it was written; `via` are the parts that led here.

    Raises InputError as `expand` does; `where` begins the message.
    """
    if isinstance(value, str):
        value = {"base": value}
    if not isinstance(value, dict):
        raise InputError(f"{where} should be a mapping, or the name of a file in {section}/")
    if "base" not in value:
        return value
    name = str(value["base"])
    if name in via:
        raise InputError(f"{where} is built on itself: {' -> '.join([*via, name])}")
    file = find_file(name, section, folders, where)
    part = read_mapping(file)
    refuse_unknown_part_keys(part, section, str(file))
    base = named_section(part, section, folders, where, (*via, name))
    return merge(base, {key: item for key, item in value.items() if key != "base"})


def find_file(name: str, section: str, folders: Sequence[Path], where: str) -> Path:
    """SECTION/NAME.yaml in the first of the folders that has it; without a section, NAME.yaml.

    Raises InputError, which names what comes nearest.
    """
    if len(name) > LONGEST_NAME:
        raise InputError(f"{where}: '{name[:20]}...' is too long to be the name of a part")
    for folder in folders:
        file = folder / section / f"{name}.yaml"
        if file.is_file():
            return file
    known = sorted({file.stem for folder in folders for file in (folder / section).glob("*.yaml")})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listed = f"known: {', '.join(known)}" if known else f"there is no file in {section}/"
    hint = f"did you mean '{near[0]}'?" if near else listed
    sought = Path(section, f"{name}.yaml")
    raise InputError(f"{where} names '{name}', but there is no {sought}; {hint}")
