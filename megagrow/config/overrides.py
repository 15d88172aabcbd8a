"""`--set path.to.key=value`: changes to a run file made on the command line."""

from copy import deepcopy
from typing import Any

from megagrow.common.yaml_file import parse_yaml
from megagrow.config.keys import DEFAULTS
from megagrow.config.stage_length import LENGTHS
from megagrow.errors import InputError


def apply_override(tree: dict[str, Any], text: str) -> dict[str, Any]:
    """A copy of `tree`, the content of a run file, with the one change that `text` asks for.

    The value is read as YAML. A number in the path is a place in a list, counted from 0. Raises
    InputError if the text has no `=`, the path does not exist, or the change would do nothing.
    """
    origin = f"--set {text}"
    path, equals, written = text.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise InputError(f"{origin}: should be path.to.key=value")
    if names == ["base"]:
        raise InputError(f"{origin}: give the path of that run file in place of this one's")
    if names[-1] == "base":
        raise InputError(f"{origin}: name the part itself, as in --set {'.'.join(names[:-1])}=NAME")
    changed = deepcopy(tree)
    _put(changed, names, parse_yaml(written, origin), origin)
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
        raise InputError(f"{origin}: has no effect, for every stage has its own; set {places}")


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
            raise InputError(f"{origin}: there is no list at '{path}'")
        inner = node[key] = {}
    _put(inner, names[1:], value, origin, f"{path}.")


def _index(items: list[Any], name: str, above: str, origin: str) -> int:
    if name.isdecimal() and int(name) < len(items):
        return int(name)
    place = above.removesuffix(".")
    raise InputError(f"{origin}: '{place}' has {len(items)} entries, counted from 0; not '{name}'")


def _holds(node: Any, names: list[str]) -> bool:
    for name in names:
        if not isinstance(node, dict) or name not in node:
            return False
        node = node[name]
    return True
