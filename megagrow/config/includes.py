"""Named parts: a section of a run file kept in a file of its own, under configs/<section>/."""

import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megagrow.common.yaml_file import read_mapping
from megagrow.config.deprecated import rename_deprecated
from megagrow.config.overrides import (
    DEFAULTS,
    PARTS,
    refuse_no_effect,
    refuse_unknown_keys,
    refuse_unknown_part_keys,
)
from megagrow.config.schema import ModelConfig
from megagrow.config.validation import model_problems
from megagrow.errors import ConfigError

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
        raise ConfigError(f"{origin}: 'stages' should be a list of stages")
    for index, stage in enumerate(stages):
        if not isinstance(stage, dict):
            raise ConfigError(f"{origin}: 'stages.{index}' should be a mapping of keys to values")
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
        raise ConfigError(f"{where} should be a mapping, or the name of a file in {section}/")
    if "base" not in value:
        return value
    name = str(value["base"])
    if name in via:
        raise ConfigError(f"{where} is built on itself: {' -> '.join([*via, name])}")
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
        raise ConfigError(f"{where}: '{name[:20]}...' is too long to be the name of a part")
    for folder in folders:
        file = folder / section / f"{name}.yaml"
        if file.is_file():
            return file
    known = sorted({file.stem for folder in folders for file in (folder / section).glob("*.yaml")})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    listed = f"known: {', '.join(known)}" if known else f"there is no file in {section}/"
    hint = f"did you mean '{near[0]}'?" if near else listed
    sought = Path(section, f"{name}.yaml")
    raise ConfigError(f"{where} names '{name}', but there is no {sought}; {hint}")


def read_run(path: Path, via: tuple[Path, ...] = ()) -> Tree:
    """The content of a run file, laid on that of the file that it names by `base`, with every named
    part put in its place; `via` are the files that led here.

    `base: gstack-1.1b` is sought as gstack-1.1b.yaml where named parts are. Mappings are merged key
    by key; `stages` and sections given by name replace what the base has. `hardware` is laid on the
    base, and the file's own keys on that. Raises InputError, in one line, for what is wrong with
    any of the files.
    """
    origin, folders = str(path), search_path(path)
    own = rename_deprecated(read_mapping(path), origin)
    refuse_unknown_keys(own, origin)
    under: Tree = {}
    if "base" in own:
        file = find_file(str(own["base"]), "", folders, f"{origin}: 'base'")
        if file in (via := (*via, path.resolve())):
            trail = " -> ".join(item.stem for item in (*via, file))
            raise ConfigError(f"{origin}: 'base' is built on itself: {trail}")
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
        raise ConfigError(f"{origin}: 'hardware' should be the name of a file in hardware/")
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
        raise ConfigError(f"{name}: no such file")
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
        raise ConfigError(f"{origin}: {'; '.join(wrong)}") from error
    if found := list(model_problems(model, "model")):
        raise ConfigError(f"{origin}: {'; '.join(found)}")
    return model
