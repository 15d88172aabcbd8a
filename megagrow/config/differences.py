"""Differences between the configurations of a checkpoint and of the run that resumes from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megagrow.config.resume_rules import Effect, effect_of
from megagrow.config.sections import UNNAMED_SET
from megagrow.errors import printable

ABSENT = "absent"
"""Value of a key of a section or a list entry that does not exist."""


@dataclass(frozen=True)
class ConfigChange:
    """A key with different values in a checkpoint and in the run that resumes from it."""

    key: str
    old: Any
    new: Any
    effect: Effect

    @property
    def matters(self) -> bool:
        """True if the later part of the run differs by more than rounding."""
        return self.effect not in (Effect.NONE, Effect.ROUNDING)

    def __str__(self) -> str:
        return f"{self.difference} ({self.effect})"

    @property
    def difference(self) -> str:
        """Key and both values, on one line."""
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"

    def as_json(self) -> dict[str, Any]:
        """Return JSON values for metrics.jsonl."""
        return {"key": self.key, "old": self.old, "new": self.new, "effect": str(self.effect)}


def config_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], stage: int
) -> list[ConfigChange]:
    """Return the differing keys of two dumps of runs, in the order of `new`.

    Dumps are nested mappings of JSON values. Keys below an added or removed section or list entry
    are not listed, except those that the other dump has at the same place. A list of validation
    corpora is compared with named sets as the set `validation`.
    """
    if any(isinstance(_validation(side), Mapping) for side in (old, new)):
        old, new = (_with_named_set(side) for side in (old, new))
    return [
        ConfigChange(key, before, after, effect_of(key, stage))
        for key, before, after in _differing(old, new)
    ]


def _validation(dump: Mapping[str, Any]) -> Any:
    return dump.get("data", {}).get("validation")


def _with_named_set(dump: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a dump with the list of validation corpora, if any, as a named set."""
    sets = _validation(dump)
    if isinstance(sets, Mapping):
        return dump
    named = {UNNAMED_SET: sets} if sets else {}
    return {**dump, "data": {**dump["data"], "validation": named}}


def _differing(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Return key, old and new value of each difference."""
    sides = [_entries(side) for side in (old, new)]
    if None in sides:
        return [] if old == new else [(key, old, new)]
    before, after = (side or {} for side in sides)
    found = []
    for name in {**after, **before}:
        place = f"{key}.{name}" if key else name
        found += _differing(before.get(name, ABSENT), after.get(name, ABSENT), place)
    return found


def _entries(value: Any) -> Mapping[str, Any] | None:
    """Return the keys of a section or the entries of a list of sections; None for other values."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        return {str(index): each for index, each in enumerate(value)}
    return None


def _shown(value: Any) -> str:
    """Return a value in short form: of a corpus its path; other sections are only named."""
    if isinstance(value, Mapping) and "path" in value:
        value = value["path"]
    if _entries(value):
        return "present"
    return "null" if value is None else printable(str(value))
