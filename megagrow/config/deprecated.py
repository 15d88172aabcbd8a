"""Deprecated spellings of keys and values, accepted wherever a configuration is read.

`rename_deprecated` and `rename_override` are applied to run files and to `--set` overrides, with a
warning per spelling. `rename_recorded` is applied to configurations recorded by earlier versions
(checkpoints, journals of file growths), without warnings: nobody can edit these. Everything that
is written uses the current names.
"""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from megagrow.errors import ConfigError

logger = logging.getLogger("megagrow.config")

SectionPath = tuple[str, ...]
"""Keys that lead to a section of a run file, without `stages` and list indices."""

RENAMED_KEYS: dict[SectionPath, dict[str, str]] = {
    (): {"stage": "objective"},
    ("growth",): {
        "literal": "paper_exact",
        "block": "new_layer_init",
        "order": "copy_order",
        "split": "copy_split",
        "layers": "layer_map",
        "probe_batches": "second_moment_batches",
    },
    ("growth", "new_entries"): {"peak": "peak_factor"},
}
"""Old name -> current name of the keys of each section."""

RENAMED_VALUES: dict[SectionPath, dict[str, str]] = {
    ("growth", "optimizer_state"): {
        "keep_v": "keep_second_moment",
        "probe_v": "estimate_second_moment",
    },
}
"""Old value -> current value of a key."""

STAGES: SectionPath = ("stages",)
"""Section of a stage; of its keys only those of `growth` are renamed, found at `("growth",)`."""


def rename_deprecated(tree: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return the content of a run file under the current names; log a warning per old spelling.

    Raises:
        ConfigError: a key is present under both names; the message starts with `origin`.
    """
    renamed: dict[str, Any] = _renamed(tree, (), origin, "", warn=True)
    return renamed


def rename_override(names: list[str], value: Any, origin: str) -> tuple[list[str], Any]:
    """Return the path and the value of an override under the current names; warn as above.

    Raises:
        ConfigError: the value is a mapping in which a key is present under both names.
    """
    current: list[str] = []
    section: SectionPath = ()
    for name in names:
        current.append(_current_key(name, section, warn=True))
        section = _inner(section, current[-1])
    return current, _renamed(value, section, origin, f"{'.'.join(current)}.", warn=True)


def rename_recorded(values: Mapping[str, Any], section: SectionPath = ()) -> dict[str, Any]:
    """Return a recorded configuration, or one `section` of it, under the current names."""
    renamed: dict[str, Any] = _renamed(values, section, "recorded configuration", "", warn=False)
    return renamed


def _inner(section: SectionPath, name: str) -> SectionPath:
    """Return the section that the key or list index `name` of `section` leads to."""
    if section == STAGES:
        return STAGES if name.isdecimal() else (name,)
    return (*section, name)


def _renamed(value: Any, section: SectionPath, origin: str, prefix: str, *, warn: bool) -> Any:
    """Return a copy of `value`, found at `section`, under the current names."""
    if isinstance(value, Mapping):
        out = {}
        for key, item in value.items():
            name = _current_key(key, section, warn=warn)
            if name != key and name in value:
                raise ConfigError(
                    f"{origin}: '{prefix}{key}' and '{prefix}{name}' are the same key; remove the "
                    f"deprecated '{prefix}{key}'"
                )
            below = _inner(section, str(name))
            out[name] = _renamed(item, below, origin, f"{prefix}{name}.", warn=warn)
        return out
    if isinstance(value, list) and section == STAGES:
        items = enumerate(value)
        return [_renamed(item, STAGES, origin, f"{prefix}{i}.", warn=warn) for i, item in items]
    current = RENAMED_VALUES.get(section, {}).get(value) if isinstance(value, str) else None
    if current is None:
        return value
    if warn:
        _warn(f"{'.'.join(section)}: {value}", f"{'.'.join(section)}: {current}")
    return current


def _current_key(key: Any, section: SectionPath, *, warn: bool) -> Any:
    current = RENAMED_KEYS.get(section, {}).get(key)
    if current is None:
        return key
    if warn:
        _warn(".".join((*section, key)), ".".join((*section, current)))
    return current


@cache
def _warn(old: str, new: str) -> None:
    """Log a deprecation once per process."""
    logger.warning("config: %s is deprecated; use %s", old, new)
