"""Parsing of untrusted YAML: plain values only, with limits on number, depth and length.

PyYAML's safe loader executes no code from the file. However, a few lines can expand to more values
than fit into memory (aliases of aliases, "billion laughs") or hold a number that takes minutes to
parse.
"""

from pathlib import Path
from typing import Any

import yaml

from megagrow.common.json_text import read_limited
from megagrow.errors import ConfigError

FILE_BYTES = 500_000
"""Maximum size of a file."""
VALUES = 50_000
"""Maximum number of values in a file, about 300 stages; an alias counts as its expansion."""
DEPTH = 50
"""Maximum nesting of mappings and lists."""
NUMBER_LENGTH = 64
"""Maximum characters of a number."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits; duplicate keys are rejected."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the node of the next value; stores its number of values, to count its aliases."""
        self._depth += 1
        event = self.peek_event()
        mark, tag = event.start_mark, getattr(event, "tag", None)
        if tag is not None:
            raise _refused(f"a tag, {tag}; use a plain value", mark)
        if self._depth > DEPTH:
            raise _refused(f"more than {DEPTH} nested mappings and lists", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and node not in self._values:
            if isinstance(node, yaml.CollectionNode) and node.end_mark is None:
                raise _refused("an alias refers to a value that contains it", mark)
            self._values[node] = 1 + sum(self._values[part] for part in _parts(node))
        if node is not None and self._values[node] > VALUES:
            raise _refused(f"expands to more than {VALUES} values", mark)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """Return the node of a string, a number, true, false or null."""
        node = super().compose_scalar_node(anchor)
        if node.tag in _NUMBERS and len(node.value) > NUMBER_LENGTH:
            raise _refused(f"a number of {len(node.value)} characters", node.start_mark)
        if any(character < " " and character not in "\t\n" for character in node.value):
            raise _refused("a control character in a text", node.start_mark)
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise _refused("half of a surrogate pair in a text", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the node of a mapping; duplicate keys are rejected."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _refused(f"duplicate key '{key.value}'", key.start_mark)
            seen.add(key.value)
        return node


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises ConfigError with the path and line."""
    try:
        raw = read_limited(path, FILE_BYTES, ConfigError)
        value = parse_yaml(raw.decode("utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file (byte {error.start})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must contain a mapping of keys to values")
    return value


def parse_yaml(text: str, origin: str) -> Any:
    """Return the value of one YAML text. Raises ConfigError with `origin` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = str(error.problem or error.context)
        if problem == "found character '\\t' that cannot start any token":
            problem = "contains a tab; indent with spaces"
        raise ConfigError(f"{origin}{line}: {problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: {error}") from error


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """Return the direct children of a node."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _refused(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
