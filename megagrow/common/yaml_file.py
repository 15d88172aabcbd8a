"""Reads one YAML file that somebody else may have written: only plain values, and not too many.

PyYAML's safe loader runs no code of the file. But a few lines of it can stand for more values than
there is memory (aliases of aliases, "billion laughs"), or for a number that takes minutes to read.
"""

from pathlib import Path
from typing import Any

import yaml

from megagrow.errors import ConfigError

FILE_BYTES = 1_000_000
VALUES = 100_000
"""In a file, with every alias counted as often as what it stands for."""
DEPTH = 50
"""Of mappings and lists within each other."""
NUMBER_LENGTH = 64
"""Characters of a number."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits; it would also let the last of two equal keys win."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The node of the next value. The count of it is kept for the aliases that repeat it."""
        self._depth += 1
        event = self.peek_event()
        mark, tag = event.start_mark, getattr(event, "tag", None)
        if tag is not None:
            raise _refused(f"a tag, {tag}; write the plain value", mark)
        if self._depth > DEPTH:
            raise _refused(f"more than {DEPTH} mappings and lists within each other", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and node not in self._values:
            if isinstance(node, yaml.CollectionNode) and node.end_mark is None:
                raise _refused("an alias stands within what it stands for", mark)
            self._values[node] = 1 + sum(self._values[part] for part in _parts(node))
        if node is not None and self._values[node] > VALUES:
            raise _refused(f"stands for more than {VALUES} values", mark)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """A text, a number, true, false or null."""
        node = super().compose_scalar_node(anchor)
        if node.tag in _NUMBERS and len(node.value) > NUMBER_LENGTH:
            raise _refused(f"a number of {len(node.value)} characters", node.start_mark)
        if any(character < " " and character not in "\t\n" for character in node.value):
            raise _refused("a control character in a text", node.start_mark)
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise _refused("half of a surrogate pair in a text", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping; two equal keys are refused."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _refused(f"'{key.value}' stands here twice", key.start_mark)
            seen.add(key.value)
        return node


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that the file holds. Raises InputError, naming the line, if it holds none."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES + 1)
        if len(raw) > FILE_BYTES:
            raise ConfigError(f"{path}: more than {FILE_BYTES} bytes; not a run file")
        value = parse_yaml(raw.decode("utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file (byte {error.start})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: should hold a mapping of keys to values")
    return value


def parse_yaml(text: str, origin: str) -> Any:
    """The value of one YAML text. Raises InputError naming `origin` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{origin}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: {error}") from error


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """The nodes directly below one."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _refused(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
