"""Reads one YAML file: safely, with its duplicate keys refused."""

from pathlib import Path
from typing import Any

import yaml

from megagrow.errors import InputError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which would let the last of two equal keys win."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"'{key.value}' stands here twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that the file holds. Raises InputError, naming the line, if it holds none."""
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file (byte {error.start})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: should hold a mapping of keys to values")
    return value


def parse_yaml(text: str, origin: str) -> Any:
    """The value of one YAML text. Raises InputError naming `origin` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{origin}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{origin}: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{origin}: {error}") from error
